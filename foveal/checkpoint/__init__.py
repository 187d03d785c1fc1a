"""Checkpoints, from which a run continues."""
