"""Commands on run directories: attempts, track; and the reference of settings and the demo's summary."""
