"""Command line of `foveal data`: index, verify, show, audit."""
