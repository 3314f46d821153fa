"""Graph passes, one per file. Each takes a program and returns it with what was done; listing the folder lists them."""
