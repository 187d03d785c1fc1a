"""Folders of shards, local or remote, behind one protocol."""

import collections
import itertools
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
_MAX_SUB_FOLDERS, _MAX_FILES = 1000, 1000  # looked at; sub-folders may hold the images of a class each


class Folder(Protocol):
    """Operations on a folder that indexing, verifying and showing need; documented in ``RemoteFolder``.

    ignores_range: whether a read is known to transfer complete files.
    """

    ignores_range: bool

    def display_path(self, name: str = "") -> str: ...
    def file_sizes(self) -> dict[str, int | None]: ...
    def sub_folder_files(self) -> dict[str, list[str]]: ...
    def file_size(self, name: str) -> int: ...
    def modified_time(self, name: str) -> float | None: ...
    def etag(self, name: str) -> str | None: ...
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

    ignores_range = False

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

    def sub_folder_files(self) -> dict[str, list[str]]:
        def scan() -> dict[str, list[str]]:
            with os.scandir(self.folder) as entries:  # all: sub-folders may lie behind 200,000 shards
                top = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
            folders, files = collections.deque(sorted(top)), dict[str, list[str]]()
            while folders and len(files) < _MAX_SUB_FOLDERS:
                folder = folders.popleft()
                deeper, names = _scan_sub_folder(self.folder / folder)
                files[folder] = names
                folders.extend(f"{folder}/{name}" for name in deeper if "/" not in folder)
            return files

        return read_with_timeout(self.folder, self._timeout, scan)

    def file_size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified_time(self, name: str) -> float | None:
        return self._stat(name).st_mtime

    def etag(self, name: str) -> str | None:
        return None

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


def _scan_sub_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return names of folders and of files in a folder, which are not hidden; none if it cannot be listed."""
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in itertools.islice(scan, _MAX_FILES) if not entry.name.startswith(".")]
            folders = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return [], []
    return folders, [entry.name for entry in entries if entry.name not in folders]
