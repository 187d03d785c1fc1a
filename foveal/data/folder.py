"""A folder of shards, here or behind a URL, by the same few verbs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from foveal.data.config import is_remote
from foveal.data.remote import PIECE, Remote
from foveal.errors import DataError

_PATIENCE = 120.0  # seconds for one request with all its attempts; nobody waits for ranks here


class Folder(Protocol):
    """What indexing, verifying and showing need of a folder; ``remote.Remote`` says what each verb does."""

    def where(self, name: str = "") -> str: ...
    def sizes(self) -> dict[str, int | None]: ...
    def size(self, name: str) -> int: ...
    def modified(self, name: str) -> float | None: ...
    def read(self, name: str, start: int, stop: int) -> bytes: ...
    def pieces(self, name: str, size: int) -> Iterator[bytes]: ...
    def open(self, name: str) -> IO[bytes]: ...


def folder_at(place: str) -> Folder:
    """The folder at a path or URL. Errors: DataError if the URL has no driver."""
    return Remote(place, _PATIENCE) if is_remote(place) else Local(place)


class Local:
    """A folder of this machine. Errors: DataError, one sentence, where the system says OSError."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def sizes(self) -> dict[str, int | None]:
        try:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise DataError(f"{self.folder}: no folder of shards ({error})") from None

    def size(self, name: str) -> int:
        return self._status(name).st_size

    def modified(self, name: str) -> float | None:
        return self._status(name).st_mtime

    def read(self, name: str, start: int, stop: int) -> bytes:
        with self.open(name) as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        with self.open(name) as stream:
            while piece := stream.read(PIECE):
                yield piece

    def open(self, name: str) -> IO[bytes]:
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise self._unread(name, error) from None

    def _status(self, name: str) -> os.stat_result:
        try:
            return (self.folder / name).stat()
        except OSError as error:
            raise self._unread(name, error) from None

    def _unread(self, name: str, error: OSError) -> DataError:
        return DataError(f"{self.where(name)} cannot be read ({error})")
