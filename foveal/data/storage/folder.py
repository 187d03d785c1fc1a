"""A folder of shards, here or behind a URL, by the same few verbs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

from foveal.data.config import is_remote
from foveal.data.storage.remote import PIECE, Remote
from foveal.errors import DataError
from foveal.timeouts import answered

T = TypeVar("T")
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
    """A folder of this machine.

    patience: seconds that a call may stand still. Errors: DataError, one sentence, where the system says OSError;
    Unreachable where it says nothing. What was opened is read without a limit.
    """

    def __init__(self, folder: str, patience: float = _PATIENCE) -> None:
        self.folder, self._patience = Path(folder), patience

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def sizes(self) -> dict[str, int | None]:
        def listed() -> dict[str, int | None]:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

        try:
            return answered(self.folder, self._patience, listed)
        except OSError as error:
            raise DataError(f"{self.folder}: no folder of shards ({error})") from None

    def size(self, name: str) -> int:
        return self._status(name).st_size

    def modified(self, name: str) -> float | None:
        return self._status(name).st_mtime

    def read(self, name: str, start: int, stop: int) -> bytes:
        def asked() -> bytes:
            with (self.folder / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)

        return self._of_file(name, asked)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        with self.open(name) as stream:
            while piece := stream.read(PIECE):
                yield piece

    def open(self, name: str) -> IO[bytes]:
        return self._of_file(name, lambda: (self.folder / name).open("rb"))

    def _status(self, name: str) -> os.stat_result:
        return self._of_file(name, (self.folder / name).stat)

    def _of_file(self, name: str, call: Callable[[], T]) -> T:
        try:
            return answered(self.where(name), self._patience, call)
        except OSError as error:
            raise DataError(f"{self.where(name)} cannot be read ({error})") from None
