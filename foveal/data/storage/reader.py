"""Readers of shards and indices in a folder or, through the node's cache, behind a URL. Thread-safe."""

import collections
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from foveal.atomic import sha256
from foveal.data.format.manifest import MANIFEST_NAME, Shard
from foveal.data.format.shard_index import INDEX_SUFFIX, ShardIndex, open_index, verify_index
from foveal.data.storage.cache import DownloadCache, RemoteFile
from foveal.data.storage.folder import Folder, LocalFolder
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError, StorageUnreachableError
from foveal.timeouts import read_with_timeout

T = TypeVar("T")
_OPEN_SHARDS = 256  # file descriptors that a reader keeps open
_READ = os.O_RDONLY | os.O_CLOEXEC
_WAITS = (0.1, 0.4, 1.5, 3.0)  # seconds between attempts: a file server may be unreachable for a moment
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # a retry cannot help
_TOUCH_SECONDS = 5.0  # interval at which the modification time of a copy in use is renewed


class ShardReader(Protocol):
    """Reader of the shards or indices of one folder.

    Raises: from all methods DataError that names the file.
    """

    folder: Folder

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset`` of a shard."""
        ...

    def verify_checksum(self, shard: Shard) -> None:
        """Raise DataError unless the shard's bytes have the sha256 of the manifest."""
        ...

    def load_index(self, shard: Shard) -> ShardIndex:
        """Return the memory-mapped index of a shard."""
        ...

    def read_in_a_row(self, read: Callable[[], T]) -> T:
        """Return the result of ``read``, which loads many indices; local ones share a thread and its time limit."""
        ...

    def remote_shard(self, shard: Shard) -> RemoteFile | None:
        """Return the shard as a file of the download cache; None if the folder is local."""
        ...

    def remote_index(self, shard: Shard) -> RemoteFile | None:
        """Return the index as a file of the download cache; None if the folder is local."""
        ...


class LocalShardReader:
    """Reader of a folder on this machine; ``stall_timeout``: seconds that reading an index may make no progress."""

    def __init__(self, folder: str, stall_timeout: float) -> None:
        self.folder: Folder = LocalFolder(folder, stall_timeout)
        self._path, self._stall_timeout = Path(folder), stall_timeout
        self._open_files = _OpenFileCache()

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        for wait in (*_WAITS, None):
            try:
                file = self._open_files.get(shard_file)
                if file is None:
                    file = self._open_files.put(shard_file, os.open(self._path / shard_file, _READ))
                data = os.pread(file.descriptor, size, offset)
                return _check_length(data, self.folder.display_path(shard_file), offset, size)
            except OSError as error:
                self._open_files.discard(shard_file)  # after a server's outage the old descriptor may stay invalid
                if wait is None or isinstance(error, _PERMANENT_ERRORS):
                    raise StorageUnreachableError(
                        f"{self.folder.display_path(shard_file)} cannot be read ({error})"
                    ) from None
            time.sleep(wait)
        raise AssertionError

    def verify_checksum(self, shard: Shard) -> None:
        try:
            checksum = sha256(self._path / shard.file)
        except OSError as error:
            raise StorageUnreachableError(f"{self.folder.display_path(shard.file)} cannot be read ({error})") from None
        if checksum != shard.sha256:
            raise DataError(
                f"{self.folder.display_path(shard.file)} is damaged, its sha256 is not the one in {MANIFEST_NAME}: "
                f"restore it, or run `foveal data index {self.folder.display_path()} --again` "
                f"if it was changed on purpose"
            )

    def load_index(self, shard: Shard) -> ShardIndex:
        file = self._path / f"{shard.file}{INDEX_SUFFIX}"

        def load() -> ShardIndex:
            index = open_index(file, shard.index, shard.samples)
            index.labels.max()  # reads all labels within the timeout; mapped pages are not read before their first use
            return index

        return read_with_timeout(file, self._stall_timeout, load)

    def read_in_a_row(self, read: Callable[[], T]) -> T:
        return read_with_timeout(self._path, self._stall_timeout, read)

    def remote_shard(self, shard: Shard) -> None:
        return None

    def remote_index(self, shard: Shard) -> None:
        return None


class CachedShardReader:
    """Reader of a folder behind a URL, through copies in the cache; ``shards``: the manifest's shards by file name."""

    def __init__(self, remote: RemoteFolder, cache: DownloadCache, shards: Mapping[str, Shard]) -> None:
        self.folder: Folder = remote
        self._remote, self._cache, self._shards = remote, cache, shards
        self._open_files = _OpenFileCache()

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        remote_file = self.remote_shard(self._shards[shard_file])
        for is_last_attempt in (False, True):
            try:
                copy = self._open_copy(remote_file)
                data = os.pread(copy.descriptor, size, offset)
                return _check_length(data, self.folder.display_path(shard_file), offset, size)
            except OSError as error:  # of this node's disk, not of the server
                self._discard_copy(remote_file)
                if is_last_attempt:
                    raise StorageUnreachableError(
                        f"the copy of {self.folder.display_path(shard_file)} cannot be read ({error})"
                    ) from None
        raise AssertionError

    def verify_checksum(self, shard: Shard) -> None:
        remote_file = self.remote_shard(shard)
        copy = self._open_copy(remote_file)
        if sha256(Path(f"/dev/fd/{copy.descriptor}")) != shard.sha256:
            self._discard_copy(remote_file)
            raise StorageUnreachableError(
                f"the copy of {self.folder.display_path(shard.file)} in {self._cache.folder} was damaged after it "
                f"came, and is removed: look at this node's disk, and start again"
            )

    def load_index(self, shard: Shard) -> ShardIndex:
        remote_file = self.remote_index(shard)
        for is_last_attempt in (False, True):
            descriptor = self._cache.open_file(remote_file)
            try:
                return open_index(Path(f"/dev/fd/{descriptor}"), shard.index, shard.samples)
            except DataError:
                self._cache.discard_copy(remote_file)  # valid after its download, damaged since
                if is_last_attempt:
                    raise StorageUnreachableError(
                        f"the copy of {self.folder.display_path(remote_file.name)} cannot be read again"
                    ) from None
            finally:
                os.close(descriptor)
        raise AssertionError

    def read_in_a_row(self, read: Callable[[], T]) -> T:
        return read()

    def remote_shard(self, shard: Shard) -> RemoteFile:
        return RemoteFile(self._remote, shard.file, shard.index, shard.bytes, shard.sha256)

    def remote_index(self, shard: Shard) -> RemoteFile:
        def validate(file: Path) -> None:
            verify_index(file)
            open_index(file, shard.index, shard.samples)

        return RemoteFile(self._remote, f"{shard.file}{INDEX_SUFFIX}", shard.index, validate=validate)

    def _open_copy(self, remote_file: RemoteFile) -> "_OpenFile":
        """Return the open copy of a file; close evicted copies, whose bytes would otherwise stay on the disk."""
        copy = self._open_files.get(remote_file.name)
        if copy is not None and copy.touch(_TOUCH_SECONDS):
            return copy
        self._open_files.discard_deleted()
        return self._open_files.put(remote_file.name, self._cache.open_file(remote_file))

    def _discard_copy(self, remote_file: RemoteFile) -> None:
        self._open_files.discard(remote_file.name)
        self._cache.discard_copy(remote_file)


class _OpenFile:
    """File descriptor closed with its last reference: another thread may still read a file that was discarded."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._touch_time = time.monotonic()

    def touch(self, interval: float) -> bool:
        """Renew the modification time once per ``interval`` seconds; return whether the file still has a name."""
        if time.monotonic() - self._touch_time > interval:
            self._touch_time = time.monotonic()
            os.utime(self.descriptor)
        return os.fstat(self.descriptor).st_nlink > 0

    def __del__(self) -> None:
        os.close(self.descriptor)


class _OpenFileCache:
    """Most recently read files, open, by name."""

    def __init__(self) -> None:
        self._files: collections.OrderedDict[str, _OpenFile] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> _OpenFile | None:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)

    def put(self, name: str, descriptor: int) -> _OpenFile:
        with self._lock:
            file = self._files[name] = _OpenFile(descriptor)
            while len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
            return file

    def discard(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def discard_deleted(self) -> None:
        """Close files that were deleted from the folder."""
        with self._lock:
            for name in [name for name, file in self._files.items() if not os.fstat(file.descriptor).st_nlink]:
                del self._files[name]


def _check_length(data: bytes, path: str, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise DataError(f"{path} is cut short: {size} bytes at {offset} are asked for, {len(data)} left")
    return data
