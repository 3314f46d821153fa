"""Export: capture, split, passes, targets, the bundle writer and verify."""
