"""State pools: fixed slots of user states in the memory where an engine computes."""
