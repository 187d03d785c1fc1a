"""Memory that processes share: files in memory without a name. Whatever process is killed, nothing of them stays."""

import errno
import os
from pathlib import Path

from foveal.cgroups import read_memory_left
from foveal.errors import ConfigError, OutOfMemoryError


def create_memory_file(name: str) -> int:
    """Return the descriptor of a new file in memory. Raises: ConfigError where the system allows none."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOMEM):
            raise
        raise ConfigError(
            f"worker processes need files in memory, which this system does not allow ({error}): set data.workers=0"
        ) from None


def allocate_memory_file(name: str, num_bytes: int, use: str, remedy: str) -> int:
    """Return the descriptor of a new file in memory with all its pages.

    A page that the first write to it has to find would end the process by SIGBUS where there is none. ``use`` and
    ``remedy`` are for the error. Raises: OutOfMemoryError; as ``create_memory_file``.
    """
    available = read_available_memory()
    if num_bytes > available:  # the kernel would kill whichever process is the largest
        raise OutOfMemoryError(
            f"{use} need {num_bytes / 1e9:.3g} GB, and this host has {available / 1e9:.3g} GB left for them: {remedy}"
        )
    descriptor = create_memory_file(name)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        os.close(descriptor)
        raise OutOfMemoryError(
            f"{use} need {num_bytes / 1e9:.3g} GB, which this host refuses ({error.strerror}): {remedy}"
        ) from None
    return descriptor


def read_available_memory() -> int:
    """Return the bytes that this process may still allocate, by the host's memory and the limits of its cgroups."""
    words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    host = sum(int(words[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    left = read_memory_left()
    return host if left is None else min(host, left)
