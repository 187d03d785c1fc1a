"""`foveal doctor`: are these nodes fit to train, before they do?"""
