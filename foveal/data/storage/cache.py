"""The node's own copies of files behind URLs, shared by its ranks and jobs. The kernel's file locks are its only state.

A copy is written as `<name>.part` under a lock on that file, checked, and renamed: what has its name is whole. A part
is made as large as it will be, so that the sizes in the folder are what is promised of the disk; when it was last
written tells waiters that it moves. A process that dies lets go of its locks, and the next one starts its part anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from foveal.data.config import CacheConfig, expand_path, is_remote
from foveal.data.format.manifest import MANIFEST_NAME
from foveal.data.storage.remote import MAX_ATTEMPTS, RemoteFolder
from foveal.errors import ConfigError, DataError, StorageUnreachableError

_log = logging.getLogger(__name__)

_LOCK = ".lock"  # held while room is made: who makes room sees all that was promised before
_PART = ".part"
_COPY_NAME = re.compile("[0-9a-f]{20}-")  # whatever else lies in the folder is somebody's, and stays
_MAX_POLL_SECONDS = 0.05  # longest pause, in seconds, between two looks at a lock that another holds
_PREFETCH_MIN_IDLE = (
    120.0  # seconds that a copy must lie unused before a download that nobody waits for may take its room
)
_SLACK = 0.05  # share of the limit that stays free after room was made, so that not every download makes some
_THRASH_SECONDS = 15.0  # seconds: a copy removed so soon after its last use will be wanted again


@dataclass(frozen=True)
class RemoteFile:
    """A remote file and how its copy is known to be right.

    version: what tells this file from others that had its name; size: in bytes, None: the server is asked;
    sha256: of its bytes, in hex, where known; check: raises DataError if the file is not what it should be.
    """

    folder: RemoteFolder
    name: str
    version: str
    size: int | None = None
    sha256: str | None = None
    validate: Callable[[Path], object] | None = field(default=None, compare=False)

    @property
    def cache_name(self) -> str:
        """The name of its copy, which no other file or version has."""
        told = json.dumps([self.folder.display_path(), self.name, self.version, self.size, self.sha256])
        return f"{hashlib.sha256(told.encode()).hexdigest()[:20]}-{self.name[-100:]}"


class CacheFullError(DataError):
    """A copy does not fit into the cache: at all, or now, when nobody waits for it."""


class DownloadCache:
    """A folder of copies that holds at most ``limit`` bytes; those unused for the longest go first.

    Any number of threads, processes and jobs may share the folder. A copy that is removed while it is read stays whole
    for its readers. patience: seconds to wait for another process whose download does not move.
    """

    def __init__(self, folder: Path, max_bytes: int, stall_timeout: float) -> None:
        self.folder, self.max_bytes, self.stall_timeout = folder, max_bytes, stall_timeout
        self._pulse = 0
        self._counting = threading.Lock()
        self._warned = False

    def open_file(self, file: RemoteFile, *, is_prefetch: bool = False) -> int:
        """A descriptor to read the copy of a file from, downloaded if need be; the caller closes it.

        ahead: nobody waits for it yet, so it takes no room from copies that are in use.
        Raises: DataError that names the file: it cannot be read, keeps arriving damaged, or (NoRoom) does not fit.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._open(file, is_prefetch)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DataError(
                f"{file.folder.display_path(file.name)} cannot be copied, {self.folder} "
                f"{'is on a full disk: lower data.cache.gigabytes, or' if full else f'cannot be used ({error}):'} "
                f"set data.cache.dir to another folder"
            ) from None

    def progress(self) -> int:
        """Grows while bytes arrive, here or in another process that this one waits for."""
        return self._pulse

    def discard_copy(self, file: RemoteFile) -> None:
        """Remove a copy that turned out to be damaged; who wants it next downloads it again."""
        (self.folder / file.cache_name).unlink(missing_ok=True)

    def _open(self, wanted: RemoteFile, ahead: bool) -> int:
        copy = self.folder / wanted.cache_name
        part = copy.with_name(copy.name + _PART)
        while True:
            found = _open_existing(copy, wanted.size)
            if found is not None:
                return found
            descriptor = self._wait_for_lock(
                part, f"{wanted.folder.display_path(wanted.name)} is being copied", copy.exists
            )
            if descriptor is None:
                continue
            try:
                if not copy.exists():  # it may have come between the two looks
                    self._download(wanted, descriptor, part, ahead)
                    with self._eviction_lock():  # who counts the files meanwhile would see neither name
                        part.rename(copy)
                    return descriptor
                part.unlink()
            except BaseException:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _wait_for_lock(self, file: Path, doing: str, done: Callable[[], bool] = lambda: False) -> int | None:
        """A descriptor with the lock on the file of this name; None if ``done`` while another held it.

        Raises: DataError if the other has not written to the file for as long as the patience.
        """
        moved, since, pause = 0, time.monotonic(), _MAX_POLL_SECONDS / 64
        while not done():
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if _try_lock(descriptor) and _has_name(descriptor, file):
                return descriptor
            about = os.fstat(descriptor)
            os.close(descriptor)
            if about.st_blocks and about.st_mtime_ns != moved:  # an empty part may be one attempt after another
                moved, since = about.st_mtime_ns, time.monotonic()
                self._add_progress(1)
            elif time.monotonic() - since > self.stall_timeout:
                raise StorageUnreachableError(
                    f"{doing} by another process of this node that has not moved for {self.stall_timeout:g} s: end that "
                    f"process, or set data.cache.dir to another folder"
                )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_SECONDS)
        return None

    def _download(self, wanted: RemoteFile, descriptor: int, part: Path, ahead: bool) -> None:
        """Fill a locked part with a file, and see that it is the one wanted."""
        where = wanted.folder.display_path(wanted.name)
        size = wanted.folder.file_size(wanted.name)
        if wanted.size not in (None, size):
            raise DataError(
                f"{where} has {size} bytes and {MANIFEST_NAME} says {wanted.size}: restore it, or index it again"
            )
        self._reserve_space(where, size, descriptor, part, ahead)
        wrong = ""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            digest, at = hashlib.sha256(), 0
            for piece in wanted.folder.iter_chunks(wanted.name, size):
                digest.update(piece)
                _write_all(descriptor, piece, at)
                at += len(piece)
                self._add_progress(len(piece))
            wrong = _find_fault(wanted, digest.hexdigest(), part)
            if not wrong:
                os.fsync(descriptor)  # or a power cut could leave a name without its bytes
                return
            _log.warning("%s: attempt %d of %d brought wrong bytes (%s)", where, attempt, MAX_ATTEMPTS, wrong)
        raise DataError(
            f"{where} is damaged: {MAX_ATTEMPTS} downloads brought wrong bytes ({wrong}): restore it, or index it again"
        )

    def _reserve_space(self, where: str, size: int, descriptor: int, part: Path, ahead: bool) -> None:
        """Make the part as large as the file will be, once other copies have left that much of the limit."""
        if size > self.max_bytes:
            raise CacheFullError(
                f"{where} has {size / 1e9:.3g} GB and the cache {self.folder} may hold {self.max_bytes / 1e9:.3g} GB: "
                f"raise data.cache.gigabytes"
            )
        until = time.monotonic() + self.stall_timeout
        while True:
            with self._eviction_lock():
                if self._evict(size, part, _PREFETCH_MIN_IDLE if ahead else 0.0):
                    os.ftruncate(descriptor, size)
                    return
            if ahead or time.monotonic() > until:
                raise CacheFullError(
                    f"{where} does not fit into the cache {self.folder}: its {self.max_bytes / 1e9:.3g} GB are taken by "
                    f"downloads under way; raise data.cache.gigabytes"
                )
            time.sleep(_MAX_POLL_SECONDS)

    @contextmanager
    def _eviction_lock(self) -> Iterator[None]:
        """Alone with the names and promised sizes of the folder's files."""
        lock = self._wait_for_lock(self.folder / _LOCK, f"{self.folder}: room is being made")
        assert lock is not None
        try:
            yield
        finally:
            os.close(lock)

    def _evict(self, size: int, part: Path, rest: float) -> bool:
        """Remove what has lain unused for the longest (and for ``rest`` seconds) until ``size`` bytes fit, if they can."""
        now, taken, old = time.time(), 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name == part.name or not _COPY_NAME.match(entry.name):
                        continue
                    if entry.name.endswith(_PART):
                        taken += _reserved_bytes(entry.path)
                        continue
                    about = entry.stat(follow_symlinks=False)
                    taken += about.st_size
                    if now - about.st_mtime >= rest:
                        old.append((about.st_mtime, about.st_size, entry.path))
        if taken + size <= self.max_bytes:
            return True
        if taken + size - sum(held for _, held, _ in old) > self.max_bytes:
            return False
        for used, held, path in sorted(old):
            if taken + size <= max(size, self.max_bytes * (1 - _SLACK)):
                break
            if now - used < _THRASH_SECONDS and not self._warned:
                self._warned = True
                _log.warning(
                    "%s: the %.3g GB of data.cache.gigabytes are fewer than the shards in use have: they are "
                    "downloaded again and again",
                    self.folder,
                    self.max_bytes / 1e9,
                )
            Path(path).unlink(missing_ok=True)
            taken -= held
        return True

    def _add_progress(self, moved: int) -> None:
        with self._counting:
            self._pulse += moved


def open_cache(cfg: CacheConfig, stall_timeout: float) -> DownloadCache:
    """The cache that the settings name.

    Raises: ConfigError for an environment variable that is not set; DataError if the default folder is another's.
    """
    limit = int(cfg.gigabytes * 1e9)
    if cfg.dir is not None:
        named = expand_path(cfg.dir, "data.cache.dir")
        if is_remote(named):
            raise ConfigError(f"data.cache.dir: {named} is a URL: give a folder on the node's own disk")
        try:
            Path(named).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache.dir: {named} cannot be made ({error}): set it to another folder") from None
        return DownloadCache(Path(named), limit, stall_timeout)
    folder = Path(tempfile.gettempdir()) / f"foveal-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error}): set data.cache.dir to another folder") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise DataError(f"{folder} is not yours alone to write to: set data.cache.dir to another folder")
    return DownloadCache(folder, limit, stall_timeout)


def _open_existing(copy: Path, size: int | None) -> int | None:
    """A descriptor of a copy that is there, now noted as used. One of a wrong size is damaged, and removed."""
    try:
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if size in (None, os.fstat(descriptor).st_size):
        with contextlib.suppress(PermissionError):  # another user's copy in a shared folder serves as well
            os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    copy.unlink(missing_ok=True)
    return None


def _find_fault(wanted: RemoteFile, sha256: str, part: Path) -> str:
    """What is wrong with a part that has arrived; empty if nothing is."""
    if wanted.sha256 not in (None, sha256):
        return f"their sha256 is {sha256[:12]}, {MANIFEST_NAME} says {wanted.sha256[:12]}"
    try:
        if wanted.validate:
            wanted.validate(part)
    except DataError as error:
        where = wanted.folder.display_path
        return str(error).replace(str(part), where(wanted.name)).replace(str(part.parent), where())
    return ""


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(descriptor: int, file: Path) -> bool:
    """Whether an open file still has this name; another may have renamed or removed it before the lock was ours."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _reserved_bytes(part: str) -> int:
    """Bytes of a part that is being written; one whose process is dead is removed, under its lock."""
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _try_lock(descriptor):
            return os.fstat(descriptor).st_size
        if _has_name(descriptor, Path(part)):
            Path(part).unlink()
        return 0
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
