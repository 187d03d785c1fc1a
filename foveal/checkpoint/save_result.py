"""Records of a checkpoint save: the pending save, each rank's result, and the published result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foveal.atomic import DISK_FULL_ERRNOS, format_bytes, free_bytes_and_mount
from foveal.checkpoint.chunks import TensorChunk, pack_write_ranges
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.writer import WriteResult, WrittenFiles


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A published checkpoint. All times are those of the slowest rank.

    stall_seconds: pause of training; write_seconds: time of the writing threads; seconds_without_overlap: duration of the same
    save without overlap, as before an exit.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    seconds_without_overlap: float
    num_bytes_all_ranks: int


@dataclass
class PendingSave:
    """A save in progress; chunks, bytes and times are this rank's."""

    folder: Path
    state: TrainState
    chunks: Sequence[TensorChunk]
    rank_num_bytes: int
    copy_seconds: float
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RankSaveResult:
    """A rank's result of a save, for all ranks. ``write_ranges``: packed; ``is_bug``: the error is no OSError."""

    files: WrittenFiles
    write_ranges: bytes
    num_bytes: int
    copy_seconds: float
    wait_seconds: float
    write_seconds: float
    error: str | None
    is_bug: bool


def rank_save_result(rank: int, pending: PendingSave, write_result: WriteResult) -> RankSaveResult:
    """Return a rank's result of a pending save after its thread has ended."""
    error = write_result.error
    message = None
    if isinstance(error, OSError):
        message = f"rank {rank}: {format_os_error(error, pending.folder.parent, pending.rank_num_bytes)}"
    elif error is not None:
        message = f"rank {rank}: {error!r}"
    return RankSaveResult(
        files=write_result.files,
        write_ranges=pack_write_ranges(pending.chunks),
        num_bytes=pending.rank_num_bytes,
        copy_seconds=pending.copy_seconds,
        wait_seconds=pending.wait_seconds,
        write_seconds=write_result.seconds,
        error=message,
        is_bug=error is not None and not isinstance(error, OSError),
    )


def format_os_error(error: OSError, root: Path, required_bytes: int) -> str:
    """Return a file system's error; for a full disk with the free and the required space."""
    if error.errno not in DISK_FULL_ERRNOS:
        return str(error)
    free, mount = free_bytes_and_mount(root)
    required = format_bytes(required_bytes)
    return f"{error.strerror} ({mount} has {format_bytes(free)} left, and {required} were to be written)"
