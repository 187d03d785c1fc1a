"""One attempt at a run: its command line, its directory, its loop, its checkpoints and its exports."""
