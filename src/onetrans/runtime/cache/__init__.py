"""The user-state cache: what a slot holds, whether a request can use it, and who holds which slot."""
