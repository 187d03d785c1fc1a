"""Errors of collectives: tell a lost peer from a mistake of the launch, record the collectives, leave the group."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from foveal.distributed.open_files import diagnose_file_limit
from foveal.errors import LaunchError
from foveal.timeouts import call_with_timeout

# gloo raises plain RuntimeErrors that name gloo's source files; NCCL's errors have classes of torch, or name NCCL.
_GLOO_ERROR = re.compile(
    r"gloo/\S+\.(?:cc|h):\d+|Connection (?:closed|reset) by peer|Timed out waiting \d+ms|monitoredBarrier|NCCL"
)
_SOURCE_PREFIX = re.compile(r"^\[\S+\.(?:cc|h):\d+\]\s*|^NCCL error in: [^\s,]+, ")
# ncclInvalidUsage and ncclInvalidArgument, by torch's name or by NCCL's text; another start would meet them again.
_NCCL_MISUSE = re.compile(r"ncclInvalid(?:Usage|Argument)|NCCL.*\binvalid (?:usage|argument)\b", re.DOTALL)
_NCCL_LAST_ERROR = re.compile(r"Last error:\s*(\S[^\n]*)", re.IGNORECASE)
_ABORT_TIMEOUT_SECONDS = 20.0
# Each setting of torch's flight recorder by its current and its former name.
_BUFFER_SIZE_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_DUMP_ON_TIMEOUT_VARIABLES = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT")
_DUMP_FILE_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def describe_peer_failure(error: BaseException) -> str | None:
    """Return a sentence if a collective failed because another rank died or did not join; None for any other error."""
    if diagnose_launch_mistake(error) is not None:
        return None
    for cause in iter_exception_chain(error):
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and _GLOO_ERROR.search(str(cause))):
            return (
                f"rank {os.environ.get('RANK', '0')} lost a peer in a collective: {summarize_collective_error(cause)}; "
                f"the logs of the other ranks say which one stopped, and where"
            )
    return None


def diagnose_launch_mistake(error: BaseException) -> LaunchError | None:
    """Return a LaunchError if a library refuses what another start would do again; None for any other error.

    These are NCCL's invalid usage (two ranks on one GPU, other collectives on other ranks) and the limit of open files
    (FileLimitError).
    """
    for cause in iter_exception_chain(error):
        if (file_limit := diagnose_file_limit(cause)) is not None:
            return file_limit
        if isinstance(cause, RuntimeError) and _NCCL_MISUSE.search(str(cause)):
            return LaunchError(
                f"NCCL refuses what rank {os.environ.get('RANK', '0')} asks for: {summarize_collective_error(cause)}; "
                f"every rank needs a GPU of its own and the same settings (NCCL_DEBUG=WARN says more)"
            )
    return None


def summarize_collective_error(error: BaseException) -> str:
    """Return the reason in an error of gloo or NCCL: NCCL's last error if it is stated, else the first sentence."""
    if last_error := _NCCL_LAST_ERROR.search(str(error)):
        return last_error.group(1).rstrip(".")
    lines = _SOURCE_PREFIX.sub("", str(error).strip()).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".")


def iter_exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then its causes and contexts, each once."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return
        error = cause


def enable_flight_recorder() -> None:
    """Make torch record the newest collectives, and NCCL dump them at a timeout. Variables set by the user stay."""
    for names, value in ((_BUFFER_SIZE_VARIABLES, "2000"), (_DUMP_ON_TIMEOUT_VARIABLES, "1")):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def set_flight_recorder_folder(folder: Path) -> None:
    """Set the dump files, ``folder/flight-<rank>`` for ``torchfrtrace``. torch reads the setting at the first dump."""
    if not any(name in os.environ for name in _DUMP_FILE_VARIABLES):
        os.environ[_DUMP_FILE_VARIABLES[0]] = str(folder.absolute() / "flight-")


def dump_cpu_flight_recorder(rank: int) -> None:
    """Dump the record of collectives on a CPU if a dump file is set; NCCL dumps its record itself at a timeout."""
    from torch._C import _distributed_c10d

    write = getattr(_distributed_c10d, "_dump_fr_trace_file", None)  # missing in some torch versions from 2.11 on
    if write is not None and any(name in os.environ for name in _DUMP_FILE_VARIABLES):
        with contextlib.suppress(RuntimeError):
            write(rank, includeCollectives=True, includeStackTraces=True, onlyActive=False)


def abort_process_group() -> None:
    """Leave a process group that may be broken, without waiting for other ranks.

    gloo destroys the group at once. NCCL would wait for the collectives in its queue, so they are aborted. Without a
    group, for example after a failed connection, there is nothing to leave.
    """
    if not dist.is_initialized():
        return
    leave: Callable[[], None] = dist.destroy_process_group
    if dist.get_backend() == "nccl":
        leave = distributed_c10d._abort_process_group  # noqa: SLF001 - torch has no public name for it
    with contextlib.suppress(TimeoutError, RuntimeError):  # the error that led to this call says more
        call_with_timeout(_ABORT_TIMEOUT_SECONDS, leave)
