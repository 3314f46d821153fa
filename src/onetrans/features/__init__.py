"""Feature schema, merging of behaviour sequences, windows, and logs in and out. Numpy, no torch."""
