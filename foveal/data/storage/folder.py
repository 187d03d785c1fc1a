"""Folders of shards, local or remote, behind one protocol."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

from foveal.data.config import is_url
from foveal.data.storage.remote import CHUNK_BYTES, RemoteFolder
from foveal.errors import DataError
from foveal.timeouts import read_with_timeout

T = TypeVar("T")
_REQUEST_TIMEOUT = 120.0  # seconds for a request with all its attempts; no other rank waits for these callers


class Folder(Protocol):
    """Operations on a folder that indexing, verifying and showing need; documented in ``RemoteFolder``."""

    def display_path(self, name: str = "") -> str: ...
    def file_sizes(self) -> dict[str, int | None]: ...
    def file_size(self, name: str) -> int: ...
    def modified_time(self, name: str) -> float | None: ...
    def read_up_to(self, name: str, start: int, stop: int) -> bytes: ...
    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]: ...
    def open_file(self, name: str) -> IO[bytes]: ...


def open_folder_or_url(path_or_url: str) -> Folder:
    """Return the folder at a path or URL. Raises: DataError if no driver for the URL is installed."""
    return RemoteFolder(path_or_url, _REQUEST_TIMEOUT) if is_url(path_or_url) else LocalFolder(path_or_url)


class LocalFolder:
    """Folder on this machine.

    timeout: seconds that a call may make no progress; reads of an open file have no limit.
    Raises: from all methods DataError for an OSError, StorageUnreachableError if storage does not answer.
    """

    def __init__(self, folder: str, timeout: float = _REQUEST_TIMEOUT) -> None:
        self.folder, self._timeout = Path(folder), timeout

    def display_path(self, name: str = "") -> str:
        return str(self.folder / name)

    def file_sizes(self) -> dict[str, int | None]:
        def scan() -> dict[str, int | None]:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

        try:
            return read_with_timeout(self.folder, self._timeout, scan)
        except OSError as error:
            raise DataError(f"{self.folder}: no folder of shards ({error})") from None

    def file_size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified_time(self, name: str) -> float | None:
        return self._stat(name).st_mtime

    def read_up_to(self, name: str, start: int, stop: int) -> bytes:
        def read() -> bytes:
            with (self.folder / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)

        return self._call_with_timeout(name, read)

    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]:
        with self.open_file(name) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def open_file(self, name: str) -> IO[bytes]:
        return self._call_with_timeout(name, lambda: (self.folder / name).open("rb"))

    def _stat(self, name: str) -> os.stat_result:
        return self._call_with_timeout(name, (self.folder / name).stat)

    def _call_with_timeout(self, name: str, call: Callable[[], T]) -> T:
        try:
            return read_with_timeout(self.display_path(name), self._timeout, call)
        except OSError as error:
            raise DataError(f"{self.display_path(name)} cannot be read ({error})") from None
