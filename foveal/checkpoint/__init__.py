"""What lets a run go on (store) and what a stage leaves for the next (export)."""
