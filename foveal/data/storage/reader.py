"""Bytes and indices of shards, from a folder or, through the node's cache, from a URL. For any number of threads."""

import collections
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from foveal.atomic import sha256
from foveal.data.format.manifest import NAME, Shard
from foveal.data.format.shard_index import SUFFIX, ShardIndex, check_index, open_index
from foveal.data.storage.cache import Cache, Wanted
from foveal.data.storage.folder import Folder
from foveal.data.storage.folder import Local as LocalFolder
from foveal.data.storage.remote import Remote
from foveal.errors import DataError, Unreachable
from foveal.timeouts import answered

_OPEN_SHARDS = 256
_READ = os.O_RDONLY | os.O_CLOEXEC
_WAITS = (0.1, 0.4, 1.5, 3.0)  # seconds between attempts: a file server may be away for a moment
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # asking again cannot help
_TOUCH = 5.0  # seconds between two notes that a copy is in use


class Reader(Protocol):
    """What reads the shards of a folder, their indices, or both.

    folder: lists its files. All methods raise DataError, one sentence that names the file.
    """

    folder: Folder

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a shard."""
        ...

    def vouch(self, shard: Shard) -> None:
        """Raise DataError unless the bytes that are read here have the sha256 that the manifest knows."""
        ...

    def index(self, shard: Shard) -> ShardIndex:
        """The index of a shard, mapped."""
        ...

    def wanted(self, shard: Shard) -> Wanted | None:
        """The shard as a file of the cache, if it is one."""
        ...

    def wanted_index(self, shard: Shard) -> Wanted | None:
        """Its index as a file of the cache, if it is one."""
        ...


class LocalReader:
    """Shards and indices of a folder of this machine; ``patience``: seconds that what a plan reads may stand still."""

    def __init__(self, folder: str, patience: float) -> None:
        self.folder: Folder = LocalFolder(folder, patience)
        self._path, self._patience = Path(folder), patience
        self._open = _Descriptors()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        for wait in (*_WAITS, None):
            try:
                held = self._open.get(shard) or self._open.put(shard, os.open(self._path / shard, _READ))
                return _whole(os.pread(held.number, size, offset), self.folder.where(shard), offset, size)
            except OSError as error:
                self._open.forget(shard)  # a file server that was away may want it opened again
                if wait is None or isinstance(error, _FINAL):
                    raise Unreachable(f"{self.folder.where(shard)} cannot be read ({error})") from None
            time.sleep(wait)
        raise AssertionError

    def vouch(self, shard: Shard) -> None:
        try:
            found = sha256(self._path / shard.file)
        except OSError as error:
            raise Unreachable(f"{self.folder.where(shard.file)} cannot be read ({error})") from None
        if found != shard.sha256:
            raise DataError(
                f"{self.folder.where(shard.file)} is damaged, its sha256 is not the one in {NAME}: restore it, or run "
                f"`foveal data index {self.folder.where()} --again` if it was changed on purpose"
            )

    def index(self, shard: Shard) -> ShardIndex:
        file = self._path / f"{shard.file}{SUFFIX}"

        def opened() -> ShardIndex:
            index = open_index(file, shard.index, shard.samples)
            index.labels.max()  # all labels are here now: what is mapped is not read before it is looked at
            return index

        return answered(file, self._patience, opened)

    def wanted(self, shard: Shard) -> None:
        return None

    def wanted_index(self, shard: Shard) -> None:
        return None


class CachedReader:
    """Shards and indices behind a URL, read from copies. ``shards`` are those of the manifest, by file name."""

    def __init__(self, remote: Remote, cache: Cache, shards: Mapping[str, Shard]) -> None:
        self.folder: Folder = remote
        self._remote, self._cache, self._shards = remote, cache, shards
        self._open = _Descriptors()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        wanted = self.wanted(self._shards[shard])
        for last in (False, True):
            try:
                held = self._copy(wanted)
                return _whole(os.pread(held.number, size, offset), self.folder.where(shard), offset, size)
            except OSError as error:  # the disk of this node, not the server
                self._drop(wanted)
                if last:
                    raise Unreachable(f"the copy of {self.folder.where(shard)} cannot be read ({error})") from None
        raise AssertionError

    def vouch(self, shard: Shard) -> None:
        wanted = self.wanted(shard)
        held = self._copy(wanted)
        if sha256(Path(f"/dev/fd/{held.number}")) != shard.sha256:
            self._drop(wanted)
            raise Unreachable(
                f"the copy of {self.folder.where(shard.file)} in {self._cache.folder} was damaged after it came, and is "
                f"removed: look at this node's disk, and start again"
            )

    def index(self, shard: Shard) -> ShardIndex:
        wanted = self.wanted_index(shard)
        for last in (False, True):
            descriptor = self._cache.open(wanted)
            try:
                return open_index(Path(f"/dev/fd/{descriptor}"), shard.index, shard.samples)
            except DataError:
                self._cache.drop(wanted)  # it was right when it came
                if last:
                    raise Unreachable(f"the copy of {self.folder.where(wanted.name)} cannot be read again") from None
            finally:
                os.close(descriptor)
        raise AssertionError

    def wanted(self, shard: Shard) -> Wanted:
        return Wanted(self._remote, shard.file, shard.index, shard.bytes, shard.sha256)

    def wanted_index(self, shard: Shard) -> Wanted:
        def check(file: Path) -> None:
            check_index(file)
            open_index(file, shard.index, shard.samples)

        return Wanted(self._remote, f"{shard.file}{SUFFIX}", shard.index, check=check)

    def _copy(self, wanted: Wanted) -> "_Descriptor":
        """The copy of a file, open. One that has left the cache is let go, or its bytes would stay on the disk."""
        held = self._open.get(wanted.name)
        if held is not None and held.in_use(_TOUCH):
            return held
        self._open.forget_removed()
        return self._open.put(wanted.name, self._cache.open(wanted))

    def _drop(self, wanted: Wanted) -> None:
        self._open.forget(wanted.name)
        self._cache.drop(wanted)


class _Descriptor:
    """An open file that closes when its last user lets go: another thread may still read when it is forgotten."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._noted = time.monotonic()

    def in_use(self, every: float) -> bool:
        """Note, once in so many seconds, that the file is in use; whether it still has a name."""
        if time.monotonic() - self._noted > every:
            self._noted = time.monotonic()
            os.utime(self.number)
        return os.fstat(self.number).st_nlink > 0

    def __del__(self) -> None:
        os.close(self.number)


class _Descriptors:
    """The files that were read last, open, by name."""

    def __init__(self) -> None:
        self._held: collections.OrderedDict[str, _Descriptor] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> _Descriptor | None:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, number: int) -> _Descriptor:
        with self._lock:
            held = self._held[name] = _Descriptor(number)
            while len(self._held) > _OPEN_SHARDS:
                self._held.popitem(last=False)
            return held

    def forget(self, name: str) -> None:
        with self._lock:
            self._held.pop(name, None)

    def forget_removed(self) -> None:
        """Let go of files that have no name any more."""
        with self._lock:
            for name in [name for name, held in self._held.items() if not os.fstat(held.number).st_nlink]:
                del self._held[name]


def _whole(data: bytes, where: str, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise DataError(f"{where} is cut short: {size} bytes at {offset} are asked for, {len(data)} left")
    return data
