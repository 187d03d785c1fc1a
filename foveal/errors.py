"""What can go wrong that a user can mend.

    FovealError            one sentence, exit code 2, no traceback
    ├── ConfigError        a setting: wrong key, type, range or combination
    ├── DataError          shards, manifest, index, or a batch that they cannot fill
    ├── CheckpointError    a run directory that cannot be continued
    ├── ExportError        an export that does not fit what is asked of it
    ├── LaunchError        ranks, launcher, devices
    └── Diverged           training became non-finite and could not be saved from it

A programmer's mistake is an ``assert`` or an ordinary exception, and keeps its traceback.
"""


class FovealError(Exception):
    """A mistake that its message explains in one sentence: what, where, and what to do."""

    exit_code = 2


class ConfigError(FovealError):
    """A setting that cannot be."""


class DataError(FovealError):
    """Shards, a manifest or an index that cannot be used as asked."""


class CheckpointError(FovealError):
    """A run directory or checkpoint that cannot be continued."""


class ExportError(FovealError):
    """An export that is not whole, or does not fit the model that wants it."""


class LaunchError(FovealError):
    """Ranks or devices that are not what the run needs."""


class Diverged(FovealError):
    """Loss or gradients became non-finite, and every rank agrees on it."""
