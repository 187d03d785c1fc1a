"""Where a run's numbers go: a file in the run directory always, MLflow where it can be reached."""
