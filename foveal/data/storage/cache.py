"""Node-local copies of remote files, shared by ranks and jobs; coordinated by the kernel's file locks alone.

A download is written to `<name>.part` under a lock on that file, verified, and renamed: a file with its final name is
complete. A part file is first extended to its final size: the sizes in the folder are the reserved disk space. Its
modification time shows waiting processes the progress. A dead process holds no lock; the next one starts anew.
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

from foveal.data.config import CacheConfig, expand_path, is_url
from foveal.data.format.manifest import MANIFEST_NAME
from foveal.data.storage.remote import MAX_ATTEMPTS, RemoteFolder
from foveal.errors import ConfigError, DataError, StorageUnreachableError

_log = logging.getLogger(__name__)

_LOCK = ".lock"  # locked during eviction, so that every process counts all earlier reservations
_PART = ".part"
_COPY_NAME = re.compile("[0-9a-f]{20}-")  # other files in the folder are foreign and stay
_MAX_POLL_SECONDS = 0.05  # longest pause between two attempts at a lock
_PREFETCH_MIN_IDLE = 120.0  # seconds that a copy must be unused before a prefetch may evict it
_SLACK = 0.05  # fraction of the limit that an eviction leaves free, so that not every download has to evict
_THRASH_SECONDS = 15.0  # a copy evicted within this time of its last use will be downloaded again


@dataclass(frozen=True)
class RemoteFile:
    """Remote file and the properties that its copy must have.

    version: distinguishes contents under the same name. size: in bytes (None: the server's answer). sha256: hex digest
    (None: unknown). validate: raises DataError if the downloaded file is invalid.
    """

    folder: RemoteFolder
    name: str
    version: str
    size: int | None = None
    sha256: str | None = None
    validate: Callable[[Path], object] | None = field(default=None, compare=False)

    @property
    def cache_name(self) -> str:
        """File name of the copy, unique to file and version."""
        identity = json.dumps([self.folder.display_path(), self.name, self.version, self.size, self.sha256])
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}-{self.name[-100:]}"


class CacheFullError(DataError):
    """A file does not fit into the cache: never, or, for a prefetch, not now."""


class DownloadCache:
    """Folder of copies of at most ``max_bytes``, with least-recently-used eviction.

    Threads, processes and jobs may share the folder. An evicted copy stays readable through open descriptors.
    other_process_timeout: seconds to wait for another process whose download makes no progress.
    """

    def __init__(self, folder: Path, max_bytes: int, other_process_timeout: float) -> None:
        self.folder, self.max_bytes, self.other_process_timeout = folder, max_bytes, other_process_timeout
        self._progress, self._progress_lock, self._has_warned = 0, threading.Lock(), False
        self.on_progress: Callable[[], None] = lambda: None  # called with every growth of ``download_counter``

    def open_file(self, file: RemoteFile, *, is_prefetch: bool = False) -> int:
        """Return a read descriptor of a file's copy, downloaded if necessary; the caller closes it.

        is_prefetch: no reader waits yet, so copies in use are not evicted.
        Raises: DataError that names the file if it cannot be read or every download is damaged; CacheFullError if it
        does not fit.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._open(file, is_prefetch)
        except OSError as error:
            is_disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = (
                "is on a full disk: lower data.cache.max_gigabytes, or"
                if is_disk_full
                else f"cannot be used ({error}):"
            )
            raise DataError(
                f"{file.folder.display_path(file.name)} cannot be copied, {self.folder} {problem} "
                f"set data.cache.dir to another folder"
            ) from None

    def download_counter(self) -> int:
        """Return a counter that grows while bytes arrive, in this process or in one that it waits for."""
        return self._progress

    def mark_used(self, file: RemoteFile) -> None:
        """Mark the copy of a file, if there is one, as just used, so that others are evicted first."""
        if (existing := _open_existing(self.folder / file.cache_name, file.size)) is not None:
            os.close(existing)

    def discard_copy(self, file: RemoteFile) -> None:
        """Remove a damaged copy; the next ``open_file`` downloads it again."""
        (self.folder / file.cache_name).unlink(missing_ok=True)

    def _open(self, file: RemoteFile, is_prefetch: bool) -> int:
        copy = self.folder / file.cache_name
        part = copy.with_name(copy.name + _PART)
        while True:
            existing = _open_existing(copy, file.size)
            if existing is not None:
                return existing
            activity = f"{file.folder.display_path(file.name)} is being copied"
            descriptor = self._wait_for_lock(part, activity, copy.exists)
            if descriptor is None:
                continue
            try:
                if not copy.exists():  # another process may have finished it before this one got the lock
                    self._download(file, descriptor, part, is_prefetch)
                    with self._eviction_lock():  # a scan of the folder during the rename could miss both names
                        part.rename(copy)
                    return descriptor
                part.unlink()
            except BaseException:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _wait_for_lock(self, path: Path, activity: str, is_done: Callable[[], bool] = lambda: False) -> int | None:
        """Return a descriptor that locks the file at ``path``; None if ``is_done()`` while another process has it.

        Raises: StorageUnreachableError if the other process has not written to the file for ``stall_timeout`` seconds.
        """
        last_write_ns, last_progress, pause = 0, time.monotonic(), _MAX_POLL_SECONDS / 64
        while not is_done():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if _try_lock(descriptor) and _has_name(descriptor, path):
                return descriptor
            status = os.fstat(descriptor)
            os.close(descriptor)
            # The mtime of an empty part is no progress: every failing attempt may create a part anew.
            if status.st_blocks and status.st_mtime_ns != last_write_ns:
                last_write_ns, last_progress = status.st_mtime_ns, time.monotonic()
                self._add_progress(1)
            elif time.monotonic() - last_progress > self.other_process_timeout:
                raise StorageUnreachableError(
                    f"{activity} by another process of this node that has not moved for {self.other_process_timeout:g} s: end "
                    f"that process, or set data.cache.dir to another folder"
                )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_SECONDS)
        return None

    def _download(self, file: RemoteFile, descriptor: int, part: Path, is_prefetch: bool) -> None:
        """Download a file into its locked part file and verify the content."""
        url = file.folder.display_path(file.name)
        size = file.folder.file_size(file.name)
        if file.size not in (None, size):
            raise DataError(
                f"{url} has {size} bytes and {MANIFEST_NAME} says {file.size}: restore it, or index it again"
            )
        self._reserve_space(url, size, descriptor, part, is_prefetch)
        fault = ""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            digest, offset = hashlib.sha256(), 0
            for chunk in file.folder.iter_chunks(file.name, size):
                digest.update(chunk)
                _write_all(descriptor, chunk, offset)
                offset += len(chunk)
                self._add_progress(len(chunk))
            fault = _find_fault(file, digest.hexdigest(), part)
            if not fault:
                os.fsync(descriptor)  # after a power cut the name must not exist without the bytes
                return
            _log.warning("%s: attempt %d of %d brought wrong bytes (%s)", url, attempt, MAX_ATTEMPTS, fault)
        raise DataError(
            f"{url} is damaged: {MAX_ATTEMPTS} downloads brought wrong bytes ({fault}): restore it, or index it again"
        )

    def _reserve_space(self, url: str, size: int, descriptor: int, part: Path, is_prefetch: bool) -> None:
        """Evict copies until ``size`` bytes fit, then extend the part file to that size."""
        if size > self.max_bytes:
            raise CacheFullError(
                f"{url} has {size / 1e9:.3g} GB and the cache {self.folder} may hold {self.max_bytes / 1e9:.3g} GB: "
                f"raise data.cache.max_gigabytes"
            )
        deadline = time.monotonic() + self.other_process_timeout
        while True:
            with self._eviction_lock():
                if self._evict(size, part, _PREFETCH_MIN_IDLE if is_prefetch else 0.0):
                    os.ftruncate(descriptor, size)
                    return
            if is_prefetch or time.monotonic() > deadline:
                raise CacheFullError(
                    f"{url} does not fit into the cache {self.folder}: its {self.max_bytes / 1e9:.3g} GB are taken by "
                    f"downloads under way; raise data.cache.max_gigabytes"
                )
            time.sleep(_MAX_POLL_SECONDS)

    @contextmanager
    def _eviction_lock(self) -> Iterator[None]:
        """Exclude other processes from changing the names and reserved sizes of the folder's files."""
        lock = self._wait_for_lock(self.folder / _LOCK, f"{self.folder}: old copies are being removed")
        assert lock is not None
        try:
            yield
        finally:
            os.close(lock)

    def _evict(self, size: int, part: Path, min_idle: float) -> bool:
        """Remove least recently used copies, unused for ``min_idle`` seconds, until ``size`` bytes fit.

        Returns: whether they fit; if they cannot, no copy is removed.
        """
        now, used_bytes, candidates = time.time(), 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name == part.name or not _COPY_NAME.match(entry.name):
                        continue
                    if entry.name.endswith(_PART):
                        used_bytes += _reserved_bytes(entry.path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                    used_bytes += status.st_size
                    if now - status.st_mtime >= min_idle:
                        candidates.append((status.st_mtime, status.st_size, entry.path))
        if used_bytes + size <= self.max_bytes:
            return True
        if used_bytes + size - sum(copy_bytes for _, copy_bytes, _ in candidates) > self.max_bytes:
            return False
        for last_use, copy_bytes, path in sorted(candidates):
            if used_bytes + size <= max(size, self.max_bytes * (1 - _SLACK)):
                break
            if now - last_use < _THRASH_SECONDS and not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "%s: the %.3g GB of data.cache.max_gigabytes are fewer than the shards in use have: they are "
                    "downloaded again and again",
                    self.folder,
                    self.max_bytes / 1e9,
                )
            Path(path).unlink(missing_ok=True)
            used_bytes -= copy_bytes
        return True

    def _add_progress(self, amount: int) -> None:
        with self._progress_lock:
            self._progress += amount
            self.on_progress()


def open_cache(cfg: CacheConfig, other_process_timeout: float) -> DownloadCache:
    """Return the cache that the settings configure.

    Raises: ConfigError if an environment variable is not set or the folder is a URL; DataError if the folder cannot be
    made, or if other users own or may write to the default folder.
    """
    max_bytes = int(cfg.max_gigabytes * 1e9)
    if cfg.dir is not None:
        path = expand_path(cfg.dir, "data.cache.dir")
        if is_url(path):
            raise ConfigError(f"data.cache.dir: {path} is a URL: give a folder on the node's own disk")
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache.dir: {path} cannot be made ({error}): set it to another folder") from None
        return DownloadCache(Path(path), max_bytes, other_process_timeout)
    folder = Path(tempfile.gettempdir()) / f"foveal-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error}): set data.cache.dir to another folder") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise DataError(f"{folder} is not yours alone to write to: set data.cache.dir to another folder")
    return DownloadCache(folder, max_bytes, other_process_timeout)


def _open_existing(copy: Path, size: int | None) -> int | None:
    """Return a descriptor of an existing copy and renew its modification time; remove a copy of the wrong size."""
    try:
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if size in (None, os.fstat(descriptor).st_size):
        with contextlib.suppress(PermissionError):  # another user's copy in a shared folder is usable too
            os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    copy.unlink(missing_ok=True)
    return None


def _find_fault(file: RemoteFile, sha256: str, part: Path) -> str:
    """Return the fault of a downloaded part; empty if it is valid."""
    if file.sha256 not in (None, sha256):
        return f"their sha256 is {sha256[:12]}, {MANIFEST_NAME} says {file.sha256[:12]}"
    try:
        if file.validate:
            file.validate(part)
    except DataError as error:
        url, folder_url = file.folder.display_path(file.name), file.folder.display_path()
        return str(error).replace(str(part), url).replace(str(part.parent), folder_url)
    return ""


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is still at ``path``; another process may have renamed or removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _reserved_bytes(part: str) -> int:
    """Return the bytes that a part file reserves; remove the part, under its lock, if its process is dead."""
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
