"""Training of the reference model: data, losses, metrics, optimisers and the loop, one file each."""
