"""Data pipeline: tar shards to batches, in a sample order computed from the seed and the step."""
