"""Exports of a run's weights, and the weights that a run starts from."""
