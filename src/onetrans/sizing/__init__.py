"""Sizing: the capacity plan, from arrivals of returning users and measured costs."""
