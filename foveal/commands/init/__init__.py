"""`foveal init`: a config file of a stage, fitted to a data set, a machine and a time budget."""
