"""Measuring: load, statistics, records and their reports."""
