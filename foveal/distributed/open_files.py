"""The number of files that a process may open. Rank 0, or torchrun's agent, holds the connections of all ranks."""

import contextlib
import errno
import os
import resource
import socket
from pathlib import Path

from foveal.distributed.launcher_process import find_own_launchers
from foveal.errors import FileLimitError

_STORE_CONNECTIONS_PER_RANK = 3  # of the rank, of its heartbeats, and of the probe that notices a lost server
_FILES_OF_ANY_RANK = 512  # shards (256 of a reader), logs, libraries
_FILES_PER_PEER, _MAX_PEER_FILES = 32, 512  # the collectives' own connections, which lead to a few peers of many
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
    """Return the number of files that a process of a run may have open, rank 0 included."""
    peers = min(_FILES_PER_PEER * (world_size - 1), _MAX_PEER_FILES)
    return _STORE_CONNECTIONS_PER_RANK * world_size + _FILES_OF_ANY_RANK + peers


def check_store_connections(world_size: int) -> None:
    """Check that this process, which serves the ranks' store, may hold the connections of all ranks.

    Without this the ranks beyond the limit would wait for an answer that never comes.
    Raises: FileLimitError.
    """
    _check_connections("rank 0", len(list(Path("/dev/fd").iterdir())), read_open_file_limit(), world_size)


def check_agent_connections(world_size: int) -> None:
    """Raise the soft limit of torchrun's agent, which started this process and serves the ranks' store.

    Linux allows that to a process of the same user; elsewhere nothing is done.
    Raises: FileLimitError if the agent's hard limit is too low for the connections of all ranks.
    """
    agent = os.getppid()
    if agent not in [launcher.pid for launcher in find_own_launchers()]:  # a shell between the agent and this rank
        return
    try:
        _, hard = resource.prlimit(agent, resource.RLIMIT_NOFILE)
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (hard, hard))
        num_opened = len(list(Path(f"/proc/{agent}/fd").iterdir()))
    except (AttributeError, OSError):
        return
    _check_connections("torchrun", num_opened, -1 if hard == resource.RLIM_INFINITY else hard, world_size)


def _check_connections(server: str, num_opened: int, limit: int, world_size: int) -> None:
    """Check that a server of the ranks' store with so many open files may hold the connections; -1: no limit."""
    connections = _STORE_CONNECTIONS_PER_RANK * world_size
    if limit >= 0 and num_opened + connections > limit:
        raise FileLimitError(
            f"{server} on {socket.gethostname()} may open {limit} files, and {world_size} ranks have {connections} "
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
