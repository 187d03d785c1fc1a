"""One attempt at a run: its command line, run directory, training loop, checkpoints and exports."""
