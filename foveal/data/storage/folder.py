"""A folder of shards, here or behind a URL, by the same few verbs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

from foveal.data.config import is_remote
from foveal.data.storage.remote import CHUNK_BYTES, RemoteFolder
from foveal.errors import DataError
from foveal.timeouts import read_with_timeout

T = TypeVar("T")
_REQUEST_TIMEOUT = 120.0  # seconds for one request with all its attempts; nobody waits for ranks here


class Folder(Protocol):
    """What indexing, verifying and showing need of a folder; ``remote.Remote`` says what each verb does."""

    def display_path(self, name: str = "") -> str: ...
    def file_sizes(self) -> dict[str, int | None]: ...
    def file_size(self, name: str) -> int: ...
    def modified_time(self, name: str) -> float | None: ...
    def read_range(self, name: str, start: int, stop: int) -> bytes: ...
    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]: ...
    def open_file(self, name: str) -> IO[bytes]: ...


def resolve_folder(path_or_url: str) -> Folder:
    """The folder at a path or URL. Raises: DataError if the URL has no driver."""
    return RemoteFolder(path_or_url, _REQUEST_TIMEOUT) if is_remote(path_or_url) else LocalFolder(path_or_url)


class LocalFolder:
    """A folder of this machine.

    patience: seconds that a call may stand still. Raises: DataError, one sentence, where the system says OSError;
    Unreachable where it says nothing. What was opened is read without a limit.
    """

    def __init__(self, folder: str, timeout: float = _REQUEST_TIMEOUT) -> None:
        self.folder, self._patience = Path(folder), timeout

    def display_path(self, name: str = "") -> str:
        return str(self.folder / name)

    def file_sizes(self) -> dict[str, int | None]:
        def listed() -> dict[str, int | None]:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

        try:
            return read_with_timeout(self.folder, self._patience, listed)
        except OSError as error:
            raise DataError(f"{self.folder}: no folder of shards ({error})") from None

    def file_size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified_time(self, name: str) -> float | None:
        return self._stat(name).st_mtime

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        def asked() -> bytes:
            with (self.folder / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)

        return self._call_with_timeout(name, asked)

    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]:
        with self.open_file(name) as stream:
            while piece := stream.read(CHUNK_BYTES):
                yield piece

    def open_file(self, name: str) -> IO[bytes]:
        return self._call_with_timeout(name, lambda: (self.folder / name).open("rb"))

    def _stat(self, name: str) -> os.stat_result:
        return self._call_with_timeout(name, (self.folder / name).stat)

    def _call_with_timeout(self, name: str, call: Callable[[], T]) -> T:
        try:
            return read_with_timeout(self.display_path(name), self._patience, call)
        except OSError as error:
            raise DataError(f"{self.display_path(name)} cannot be read ({error})") from None
