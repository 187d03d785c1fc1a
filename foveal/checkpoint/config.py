"""Settings of checkpoints."""

from foveal.config import Config, machine


class CheckpointConfig(Config):
    """When checkpoints are written, and which are kept."""

    every: int = machine(1000, "Steps between checkpoints; 0: only at the end and on a request to stop.", ge=0)
    keep: int = machine(2, "Number of newest checkpoints to keep.", ge=1)
    keep_every: int = machine(0, "Also keep checkpoints whose step is a multiple of this number; 0: none.", ge=0)
    max_gigabytes: float = machine(
        200.0,
        "Maximum size of a run's checkpoints in GB: the oldest are removed, never the newest. 0: no limit.",
        ge=0,
    )
    async_save: bool = machine(True, "Write checkpoints in the background; false: training waits for the disk.")
