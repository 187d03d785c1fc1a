"""Order of samples: subsets of splits, mixtures of sources, and the samples of every step."""
