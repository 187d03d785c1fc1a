"""What can go wrong, what a user reads about it, and the exit code that tells a job script what to do.

    FovealError            one sentence, no traceback                             exit code  requeued
    ├── ConfigError        a setting: wrong key, type, range or combination               2  no
    ├── DataError          shards, manifest, index, or a batch that they cannot fill      2  no
    │   └── Unreachable    storage or network that did not answer, after several attempts      5  yes
    ├── CheckpointError    a run directory that cannot be continued                       2  no
    │   └── Held               another attempt is writing it                              2  no
    ├── ExportError        an export that does not fit what is asked of it                2  no
    ├── OutOfMemory        a GPU or a host whose memory does not suffice                   2  no
    ├── LaunchError        ranks, launcher, devices                                       2  no
    │   ├── RankConflict       ranks of two runs, or one rank twice, at one address       2  no
    │   └── NotRequeued    a run that has saved and left, and Slurm would not have it back    1  asked again
    ├── Diverged           training became non-finite, and going back did not help        3  no
    ├── Superseded         another attempt at the same run has taken over                 4  no
    ├── Hung               a rank was lost, or nothing moved any more                     5  yes
    ├── BadNode            a node that should not train                                   6  where it can be left out
    └── Restarting         a run that is started again and again and gets no further      7  no

Exit code 0: finished, or saved and left as asked. 1: anything else, with its traceback; requeued. A programmer's mistake
is an ``assert`` or an ordinary exception.
"""

from foveal.redact import redact


class FovealError(Exception):
    """A mistake that its message explains in one sentence, without secrets: what, where, and what to do."""

    exit_code = 2

    def __init__(self, *message_parts: object) -> None:
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in message_parts))


class ConfigError(FovealError):
    """A setting that cannot be."""


class DataError(FovealError):
    """Shards, a manifest or an index that cannot be used as asked."""


class StorageUnreachableError(DataError):
    """Storage or network that did not give what it has, after several attempts; another node may fare better."""

    exit_code = 5


class CheckpointError(FovealError):
    """A run directory or checkpoint that cannot be continued."""


class RunInUseError(CheckpointError):
    """A run directory that another attempt is writing."""


class ExportError(FovealError):
    """An export that is not whole, or does not fit the model that wants it."""


class OutOfMemoryError(FovealError):
    """A GPU, or a host, that has too little memory for what it is asked: another start would ask the same."""


class LaunchError(FovealError):
    """Ranks or devices that are not what the run needs."""


class RankConflictError(LaunchError):
    """Ranks of different runs, or two of one number, came to one address."""


class RequeueRefusedError(LaunchError):
    """The run was saved, and Slurm refused to start its job again: the job script may ask once more."""

    exit_code = 1


class TrainingDivergedError(FovealError):
    """Loss or gradients became non-finite, going back did not help, and every rank agrees on it."""

    exit_code = 3


class AttemptSupersededError(FovealError):
    """Another attempt at the same run has begun: this one writes nothing more."""

    exit_code = 4


class TrainingHungError(FovealError):
    """A rank was lost, or nothing moved for so long that waiting on would be in vain."""

    exit_code = 5


class BadNodeError(FovealError):
    """A node that the preflight found unfit."""

    exit_code = 6


class RestartLoopError(FovealError):
    """Attempt after attempt ended without a new checkpoint: another would too."""

    exit_code = 7
