"""Errors that a user sees, and the exit code that tells the job script what to do.

    FovealError                     one sentence, no traceback                       exit code  requeued
    ├── ConfigError                 a setting: wrong key, type, range or combination         2  no
    ├── DataError                   shards, manifest or index, or too few samples            2  no
    │   └── StorageUnreachableError storage or network without an answer after retries       5  yes
    ├── CheckpointError             a run directory that cannot be continued                 2  no
    │   └── RunInUseError           a run directory that another attempt is writing          2  no
    ├── ExportError                 an export that does not fit its use                      2  no
    ├── OutOfMemoryError            too little memory on a GPU or a host                     2  no
    ├── LaunchError                 ranks, launcher, devices                                 2  no
    │   ├── RankConflictError       ranks of two runs, one rank twice, or two on one GPU     2  no
    │   ├── FileLimitError          more open files than a process may have                  2  no
    │   └── RequeueRefusedError     the run was saved; Slurm refused to requeue its job      1  by the job script
    ├── TrainingDivergedError       training non-finite in spite of roll-backs               3  no
    ├── AttemptSupersededError      another attempt at the same run has taken over           4  no
    ├── TrainingHungError           a lost rank, or no progress                              5  yes
    ├── WorkerLostError             a process of the loader that was killed or ended         5  yes
    ├── BadNodeError                a node that failed the preflight                         6  if excludable
    └── RestartLoopError            restarts without a new checkpoint                        7  no

Exit code 0: the run finished, or was saved and stopped on request. 1: any other exception, with its traceback;
requeued. A programming error is an ``assert`` or an ordinary exception.
"""

from foveal.redact import redact


class FovealError(Exception):
    """An error with a one-sentence message: the fault, its place and the remedy. Secrets are redacted."""

    exit_code = 2

    def __init__(self, *message_parts: object) -> None:
        super().__init__(*(redact(part) if isinstance(part, str) else part for part in message_parts))


class ConfigError(FovealError):
    """An invalid setting or combination of settings."""


class DataError(FovealError):
    """Shards, a manifest or an index that do not fit the settings."""


class StorageUnreachableError(DataError):
    """Storage or network without an answer after several attempts; a start on another node may succeed."""

    exit_code = 5


class CheckpointError(FovealError):
    """A run directory or checkpoint that cannot be continued."""


class RunInUseError(CheckpointError):
    """A run directory that another attempt is writing."""


class ExportError(FovealError):
    """An export that is incomplete, or does not fit the model that loads it."""


class OutOfMemoryError(FovealError):
    """Too little memory on a GPU or a host; a restart would need the same amount."""


class LaunchError(FovealError):
    """Ranks or devices that do not fit the run."""


class RankConflictError(LaunchError):
    """Ranks of different runs, or two ranks of the same number, at one address; or two ranks on one GPU."""


class FileLimitError(LaunchError):
    """More open files than the limit of a process; a restart would need as many."""


class RequeueRefusedError(LaunchError):
    """Slurm refused to requeue the job of a saved run; the job script may retry."""

    exit_code = 1


class TrainingDivergedError(FovealError):
    """Loss or gradients stayed non-finite in spite of roll-backs; raised on every rank."""

    exit_code = 3


class AttemptSupersededError(FovealError):
    """Another attempt at the same run has begun; this attempt writes nothing more."""

    exit_code = 4


class TrainingHungError(FovealError):
    """A rank was lost, or training made no progress within the time limit."""

    exit_code = 5


class WorkerLostError(FovealError):
    """A process of the loader was killed, for example for memory, or ended."""

    exit_code = 5


class BadNodeError(FovealError):
    """A node that failed the preflight."""

    exit_code = 6


class RestartLoopError(FovealError):
    """Several attempts in a row ended without a new checkpoint."""

    exit_code = 7
