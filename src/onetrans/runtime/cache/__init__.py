"""The user-state cache: what a slot holds, whether a request can use it, and which slot belongs to whom."""
