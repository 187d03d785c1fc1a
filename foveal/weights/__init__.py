"""Weights that leave a run and weights that a run starts from."""
