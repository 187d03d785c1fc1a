"""`foveal data`: index, verify, show, audit."""
