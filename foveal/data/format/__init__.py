"""The files that describe a data set."""
