"""Exported models in use: predictions, features, and their files."""
