"""A peer that is gone: how it is recognised, what is recorded of it, and how the group is left."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from foveal.timeouts import call_with_timeout

# gloo raises plain RuntimeErrors, which name its source files; NCCL's are torch's own classes.
_GLOO = re.compile(
    r"gloo/\S+\.(?:cc|h):\d+|Connection (?:closed|reset) by peer|Timed out waiting \d+ms|monitoredBarrier|NCCL"
)
_SOURCE = re.compile(r"^\[\S+\.(?:cc|h):\d+\]\s*")
_ABORT_TIMEOUT_SECONDS = 20.0  # seconds that leaving a broken group may take
# Which of two names a setting has: what torch calls it today, and what it was called.
_BUFFER_SIZE_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_DUMP_ON_TIMEOUT_VARIABLES = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT")
_DUMP_FILE_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def describe_peer_failure(error: BaseException) -> str | None:
    """A sentence where a collective failed because another rank died or did not come; nothing for any other error."""
    for each in iter_exception_chain(error):
        if isinstance(each, dist.DistError) or (isinstance(each, RuntimeError) and _GLOO.search(str(each))):
            words = _SOURCE.sub("", str(each).strip()).splitlines() or [type(each).__name__]
            what = words[0].partition(". ")[0].rstrip(".")
            return (
                f"rank {os.environ.get('RANK', '0')} lost a peer in a collective: {what}; the logs of the other ranks say "
                f"which one stopped, and where"
            )
    return None


def iter_exception_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        following = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if following is None:
            return
        error = following


def enable_flight_recorder() -> None:
    """Have torch remember the newest collectives, and NCCL write them down at a timeout; what the user set stays."""
    for names, value in ((_BUFFER_SIZE_VARIABLES, "2000"), (_DUMP_ON_TIMEOUT_VARIABLES, "1")):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def set_flight_recorder_folder(folder: Path) -> None:
    """Where the record goes, ``flight-<rank>``: torch asks for it at the first dump. ``torchfrtrace`` reads the files."""
    if not any(name in os.environ for name in _DUMP_FILE_VARIABLES):
        os.environ[_DUMP_FILE_VARIABLES[0]] = str(folder.absolute() / "flight-")


def dump_flight_recorder(rank: int) -> None:
    """Write the record of a CPU's collectives, if there is a place for it; NCCL writes its own at a timeout."""
    from torch._C import _distributed_c10d

    write = getattr(_distributed_c10d, "_dump_fr_trace_file", None)  # not in every torch from 2.11 on
    if write is not None and any(name in os.environ for name in _DUMP_FILE_VARIABLES):
        with contextlib.suppress(RuntimeError):
            write(rank, includeCollectives=True, includeStackTraces=True, onlyActive=False)


def abort_process_group() -> None:
    """Leave a group that may be broken, and wait for nobody.

    gloo lets go of it at once. NCCL would wait for the collectives in its queue: it is told to abort them.
    """
    end: Callable[[], None] = dist.destroy_process_group
    if dist.get_backend() == "nccl":
        end = distributed_c10d._abort_process_group  # noqa: SLF001 - there is no public name for it
    with contextlib.suppress(TimeoutError, RuntimeError):  # what is being raised says more
        call_with_timeout(_ABORT_TIMEOUT_SECONDS, end)
