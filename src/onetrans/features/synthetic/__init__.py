"""Synthetic logs of a small world of users and items, so that everything can be tried without data."""
