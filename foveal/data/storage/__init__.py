"""Access to shard files in local folders, object stores and the node's download cache."""
