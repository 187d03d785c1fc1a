"""Runs inside a run: folds and trials."""
