"""`foveal plan`: memory, time and traffic of a config on a cluster, computed on a machine without GPUs."""
