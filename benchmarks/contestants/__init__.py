"""Contestants: who computes what is measured; our own programs and kernels, and their rivals."""
