"""The number of files that a process may open. Rank 0 holds the connections of all ranks to their store."""

import contextlib
import errno
import os
import resource
import socket
from pathlib import Path

from foveal.errors import FileLimitError

_STORE_CONNECTIONS_PER_RANK = 3  # of the rank, of its heartbeats, and of the probe that notices a lost server
_OTHER_FILES = 1024  # shards, logs, libraries, and the collectives' own connections
# Libraries put the text of EMFILE into errors of their own. That of ENFILE, which is about the whole node, is longer.
_EMFILE_TEXT = os.strerror(errno.EMFILE)
_ENFILE_TEXT = os.strerror(errno.ENFILE)
OPEN_FILES_REMEDY = "raise the hard limit of the nodes (`ulimit -Hn`; LimitNOFILE of slurmd, nofile in limits.conf)"


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files of this process to its hard limit. Return the limit that holds then."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has an infinite hard limit and allows less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return read_open_file_limit()


def read_open_file_limit() -> int:
    """Return the soft limit of open files of this process; -1 if there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return -1 if soft == resource.RLIM_INFINITY else soft


def count_files_needed(world_size: int) -> int:
    """Return the number of files that a process of a run may have open: as rank 0, of a large job."""
    return _STORE_CONNECTIONS_PER_RANK * world_size + _OTHER_FILES


def check_store_connections(world_size: int) -> None:
    """Check that this process, which serves the ranks' store, may hold the connections of all ranks.

    Without this the ranks beyond the limit would wait for an answer that never comes.
    Raises: FileLimitError.
    """
    limit, connections = read_open_file_limit(), _STORE_CONNECTIONS_PER_RANK * world_size
    if limit >= 0 and len(list(Path("/dev/fd").iterdir())) + connections > limit:
        raise FileLimitError(
            f"rank 0 on {socket.gethostname()} may open {limit} files, and {world_size} ranks have {connections} "
            f"connections to it: {OPEN_FILES_REMEDY} to {count_files_needed(world_size)}"
        )


def diagnose_file_limit(error: BaseException) -> FileLimitError | None:
    """Return a FileLimitError if this process has opened as many files as it may; None for any other error."""
    text = str(error)
    is_limit = isinstance(error, OSError) and error.errno == errno.EMFILE
    if not is_limit and not (isinstance(error, RuntimeError) and _EMFILE_TEXT in text and _ENFILE_TEXT not in text):
        return None
    return FileLimitError(
        f"{socket.gethostname()}: all {read_open_file_limit()} files that a process may open are in use: {OPEN_FILES_REMEDY}"
    )
