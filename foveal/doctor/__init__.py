"""`foveal doctor`: check that nodes are fit to train before a run starts."""
