"""The third stage: an encoder learns classes from labels."""
