"""Indices for shards that others wrote."""
