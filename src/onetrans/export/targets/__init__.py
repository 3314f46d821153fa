"""Targets: what a split's graphs are lowered to. One folder per target, one lowering per semantic op in it."""
