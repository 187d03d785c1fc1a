"""File formats of a data set: the manifest and the index of a shard."""
