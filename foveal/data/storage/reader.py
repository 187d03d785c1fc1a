"""Bytes and indices of shards, from a folder or, through the node's cache, from a URL. For any number of threads."""

import collections
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from foveal.atomic import sha256
from foveal.data.format.manifest import MANIFEST_NAME, Shard
from foveal.data.format.shard_index import INDEX_SUFFIX, ShardIndex, open_index, verify_index
from foveal.data.storage.cache import DownloadCache, RemoteFile
from foveal.data.storage.folder import Folder, LocalFolder
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError, StorageUnreachableError
from foveal.timeouts import read_with_timeout

_OPEN_SHARDS = 256
_READ = os.O_RDONLY | os.O_CLOEXEC
_WAITS = (0.1, 0.4, 1.5, 3.0)  # seconds between attempts: a file server may be away for a moment
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # asking again cannot help
_TOUCH = 5.0  # seconds between two notes that a copy is in use


class ShardReader(Protocol):
    """What reads the shards of a folder, their indices, or both.

    folder: lists its files. All methods raise DataError, one sentence that names the file.
    """

    folder: Folder

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a shard."""
        ...

    def verify_checksum(self, shard: Shard) -> None:
        """Raise DataError unless the bytes that are read here have the sha256 that the manifest knows."""
        ...

    def load_index(self, shard: Shard) -> ShardIndex:
        """The index of a shard, mapped."""
        ...

    def remote_shard(self, shard: Shard) -> RemoteFile | None:
        """The shard as a file of the cache, if it is one."""
        ...

    def remote_index(self, shard: Shard) -> RemoteFile | None:
        """Its index as a file of the cache, if it is one."""
        ...


class LocalShardReader:
    """Shards and indices of a folder of this machine; ``patience``: seconds that what a plan reads may stand still."""

    def __init__(self, folder: str, stall_timeout: float) -> None:
        self.folder: Folder = LocalFolder(folder, stall_timeout)
        self._path, self._patience = Path(folder), stall_timeout
        self._open = _OpenFileCache()

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        for wait in (*_WAITS, None):
            try:
                held = self._open.get(shard_file) or self._open.put(shard_file, os.open(self._path / shard_file, _READ))
                return _check_length(
                    os.pread(held.number, size, offset), self.folder.display_path(shard_file), offset, size
                )
            except OSError as error:
                self._open.discard(shard_file)  # a file server that was away may want it opened again
                if wait is None or isinstance(error, _FINAL):
                    raise StorageUnreachableError(
                        f"{self.folder.display_path(shard_file)} cannot be read ({error})"
                    ) from None
            time.sleep(wait)
        raise AssertionError

    def verify_checksum(self, shard: Shard) -> None:
        try:
            found = sha256(self._path / shard.file)
        except OSError as error:
            raise StorageUnreachableError(f"{self.folder.display_path(shard.file)} cannot be read ({error})") from None
        if found != shard.sha256:
            raise DataError(
                f"{self.folder.display_path(shard.file)} is damaged, its sha256 is not the one in {MANIFEST_NAME}: restore it, or run "
                f"`foveal data index {self.folder.display_path()} --again` if it was changed on purpose"
            )

    def load_index(self, shard: Shard) -> ShardIndex:
        file = self._path / f"{shard.file}{INDEX_SUFFIX}"

        def opened() -> ShardIndex:
            index = open_index(file, shard.index, shard.samples)
            index.labels.max()  # all labels are here now: what is mapped is not read before it is looked at
            return index

        return read_with_timeout(file, self._patience, opened)

    def remote_shard(self, shard: Shard) -> None:
        return None

    def remote_index(self, shard: Shard) -> None:
        return None


class CachedShardReader:
    """Shards and indices behind a URL, read from copies. ``shards`` are those of the manifest, by file name."""

    def __init__(self, remote: RemoteFolder, cache: DownloadCache, shards: Mapping[str, Shard]) -> None:
        self.folder: Folder = remote
        self._remote, self._cache, self._shards = remote, cache, shards
        self._open = _OpenFileCache()

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        wanted = self.remote_shard(self._shards[shard_file])
        for last in (False, True):
            try:
                held = self._open_copy(wanted)
                return _check_length(
                    os.pread(held.number, size, offset), self.folder.display_path(shard_file), offset, size
                )
            except OSError as error:  # the disk of this node, not the server
                self._discard_copy(wanted)
                if last:
                    raise StorageUnreachableError(
                        f"the copy of {self.folder.display_path(shard_file)} cannot be read ({error})"
                    ) from None
        raise AssertionError

    def verify_checksum(self, shard: Shard) -> None:
        wanted = self.remote_shard(shard)
        held = self._open_copy(wanted)
        if sha256(Path(f"/dev/fd/{held.number}")) != shard.sha256:
            self._discard_copy(wanted)
            raise StorageUnreachableError(
                f"the copy of {self.folder.display_path(shard.file)} in {self._cache.folder} was damaged after it came, and is "
                f"removed: look at this node's disk, and start again"
            )

    def load_index(self, shard: Shard) -> ShardIndex:
        wanted = self.remote_index(shard)
        for last in (False, True):
            descriptor = self._cache.open_file(wanted)
            try:
                return open_index(Path(f"/dev/fd/{descriptor}"), shard.index, shard.samples)
            except DataError:
                self._cache.discard_copy(wanted)  # it was right when it came
                if last:
                    raise StorageUnreachableError(
                        f"the copy of {self.folder.display_path(wanted.name)} cannot be read again"
                    ) from None
            finally:
                os.close(descriptor)
        raise AssertionError

    def remote_shard(self, shard: Shard) -> RemoteFile:
        return RemoteFile(self._remote, shard.file, shard.index, shard.bytes, shard.sha256)

    def remote_index(self, shard: Shard) -> RemoteFile:
        def check(file: Path) -> None:
            verify_index(file)
            open_index(file, shard.index, shard.samples)

        return RemoteFile(self._remote, f"{shard.file}{INDEX_SUFFIX}", shard.index, validate=check)

    def _open_copy(self, wanted: RemoteFile) -> "_OpenFile":
        """The copy of a file, open. One that has left the cache is let go, or its bytes would stay on the disk."""
        held = self._open.get(wanted.name)
        if held is not None and held.touch(_TOUCH):
            return held
        self._open.discard_deleted()
        return self._open.put(wanted.name, self._cache.open_file(wanted))

    def _discard_copy(self, wanted: RemoteFile) -> None:
        self._open.discard(wanted.name)
        self._cache.discard_copy(wanted)


class _OpenFile:
    """An open file that closes when its last user lets go: another thread may still read when it is forgotten."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._noted = time.monotonic()

    def touch(self, every: float) -> bool:
        """Note, once in so many seconds, that the file is in use; whether it still has a name."""
        if time.monotonic() - self._noted > every:
            self._noted = time.monotonic()
            os.utime(self.number)
        return os.fstat(self.number).st_nlink > 0

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFileCache:
    """The files that were read last, open, by name."""

    def __init__(self) -> None:
        self._held: collections.OrderedDict[str, _OpenFile] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> _OpenFile | None:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, number: int) -> _OpenFile:
        with self._lock:
            held = self._held[name] = _OpenFile(number)
            while len(self._held) > _OPEN_SHARDS:
                self._held.popitem(last=False)
            return held

    def discard(self, name: str) -> None:
        with self._lock:
            self._held.pop(name, None)

    def discard_deleted(self) -> None:
        """Let go of files that have no name any more."""
        with self._lock:
            for name in [name for name, held in self._held.items() if not os.fstat(held.number).st_nlink]:
                del self._held[name]


def _check_length(data: bytes, where: str, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise DataError(f"{where} is cut short: {size} bytes at {offset} are asked for, {len(data)} left")
    return data
