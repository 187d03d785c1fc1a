"""Bytes of a member of a shard, from a folder or from a URL. For any number of threads."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveal.data.config import is_remote
from foveal.errors import DataError

Read = Callable[[str, int, int], bytes]  # (shard, offset, size)

_OPEN_SHARDS = 256


def reader(folder: str) -> Read:
    """A function that reads ``size`` bytes at ``offset`` of a shard in ``folder``.

    It raises DataError if the shard cannot be read or ends before.
    """
    fetch = _remote(folder) if is_remote(folder) else _local(Path(folder))

    def read(shard: str, offset: int, size: int) -> bytes:
        try:
            data = fetch(shard, offset, size)
        except OSError as error:
            raise DataError(f"{folder}/{shard} cannot be read ({error})") from None
        if len(data) != size:
            raise DataError(f"{folder}/{shard} is cut short: {size} bytes at {offset} are asked for, {len(data)} left")
        return data

    return read


class _Descriptor:
    """An open file that closes when its last user lets go: another thread may still read when it leaves the cache."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _local(folder: Path) -> Read:
    @functools.lru_cache(maxsize=_OPEN_SHARDS)
    def descriptor(shard: str) -> _Descriptor:
        return _Descriptor(folder / shard)

    def fetch(shard: str, offset: int, size: int) -> bytes:
        held = descriptor(shard)
        return os.pread(held.number, size, offset)

    return fetch


def _remote(folder: str) -> Read:
    filesystem, root = remote_folder(folder)

    def fetch(shard: str, offset: int, size: int) -> bytes:
        return filesystem.cat_file(f"{root}/{shard}", start=offset, end=offset + size)

    return fetch


def remote_folder(folder: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it, without a slash at the end.

    Errors: DataError if no driver for the URL is installed.
    """
    import fsspec  # only data behind URLs needs it: 0.1 s of import

    try:
        filesystem, root = fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError) as error:
        raise DataError(f"{folder} cannot be opened ({error})") from None
    return filesystem, root.rstrip("/")


def file_sizes(folder: str) -> dict[str, int]:
    """The files of a folder or URL and their bytes."""
    if is_remote(folder):
        filesystem, root = remote_folder(folder)
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in filesystem.ls(root, detail=True)}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
