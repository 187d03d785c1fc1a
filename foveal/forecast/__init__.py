"""`foveal plan`: what a config will need and take on so many GPUs, computed on a machine that has none."""
