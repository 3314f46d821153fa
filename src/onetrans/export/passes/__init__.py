"""Graph passes, one per file: each takes a program and gives a new one. Listing the folder lists the optimisations."""
