"""Runs that consist of several nested runs: cross-validation and trials."""
