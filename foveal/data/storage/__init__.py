"""Bytes of shards from folders, object stores and the node's cache."""
