"""Adapters: what export needs to know of a model, one file per model family."""
