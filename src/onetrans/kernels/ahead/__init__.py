"""Kernels compiled ahead of time, without a GPU: which variants serving needs, and what the compiler made of each."""
