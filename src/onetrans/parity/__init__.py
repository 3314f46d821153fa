"""Parity: cases, the bound, comparison and verify. Needs no torch."""
