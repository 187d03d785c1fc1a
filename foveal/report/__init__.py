"""Reports of runs and pipelines as self-contained HTML pages, and comparisons of runs."""
