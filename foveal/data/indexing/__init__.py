"""Indexing of existing tar shards."""
