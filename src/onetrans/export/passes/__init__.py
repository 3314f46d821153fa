"""Graph passes, one per file. Each takes a program and returns (program, what it did); listing the folder lists them."""
