"""Parity tests: the model against independent cases, and every target against the gold."""
