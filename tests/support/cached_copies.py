"""Helpers for tests of the download cache and the prefetcher."""

import os
import time
from collections.abc import Callable

from foveal.data.storage.cache import DownloadCache, RemoteFile

FileFactory = Callable[[int], RemoteFile]
SIZE = 100_000  # bytes of each file


def read_copy(cache: DownloadCache, file: RemoteFile) -> bytes:
    descriptor = cache.open_file(file)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def copy_names(cache: DownloadCache) -> list[str]:
    """Return the names of files with a copy, least recently used first."""
    cache.folder.mkdir(exist_ok=True)
    copies = [file for file in cache.folder.iterdir() if file.name != ".lock"]
    return [file.name.partition("-")[2] for file in sorted(copies, key=lambda file: file.stat().st_mtime_ns)]


def age(cache: DownloadCache, file: RemoteFile, seconds: float) -> None:
    """Set the last use of a copy to ``seconds`` ago."""
    moment = time.time() - seconds
    os.utime(cache.folder / file.cache_name, (moment, moment))
