"""Atomic files and folders: written as a draft, forced to disk, published by one rename."""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import FileIO
from pathlib import Path
from typing import Any

from foveal.errors import CheckpointError

DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota exceeded, file too large
_CHUNK = 1 << 22
_log = logging.getLogger(__name__)
_UNSUPPORTED_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # the file system lacks the operation
_C_LIBRARY = ctypes.CDLL(None, use_errno=True)


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """fsync a file, or a folder's directory entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:  # some file systems cannot fsync a folder
            raise
    finally:
        os.close(descriptor)


def reserve_space(descriptor: int, num_bytes: int) -> None:
    """Give an open file its final size on disk: a full disk or an exceeded quota fails here, before the first byte.

    Calls Linux's fallocate. Where the file system lacks it (NFS before 4.2, some FUSE), ``os.posix_fallocate`` would
    write a byte into every 4 KiB; this reserves nothing, and a full disk fails a write or the fsync. Raises: OSError.
    """
    fallocate = getattr(_C_LIBRARY, "fallocate", None)  # not on macOS
    arguments = ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(num_bytes)
    while fallocate is not None and fallocate(*arguments):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED_ERRNOS:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_atomic(file: Path, content: bytes) -> None:
    """Replace a file's content: a reader sees the old bytes or the new, never a part. On disk on return.

    The draft's name contains the process id, so that two processes can write the same file.
    Raises: OSError; CheckpointError if the path is a folder.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(content)
        fsync(draft)
        draft.replace(file)
    except IsADirectoryError:
        raise _not_a_file_error(file) from None
    finally:
        draft.unlink(missing_ok=True)
    fsync(file.parent)


def encode_json(value: Any) -> bytes:
    """Return a value as indented UTF-8 JSON, the form of all foveal files."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def encode_json_lines(values: Iterable[Any]) -> bytes:
    """Return the values as JSON lines."""
    return b"".join(f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomic(file, encode_json(value))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a run directory.

    Raises: OSError; CheckpointError if the path is a folder or the content is not a JSON object.
    """
    return parse_json_object(read_file_bytes(file), file)


def read_file_bytes(file: Path) -> bytes:
    """Return the bytes of a file of a run directory. Raises: OSError; CheckpointError if the path is a folder."""
    try:
        return file.read_bytes()
    except IsADirectoryError:
        raise _not_a_file_error(file) from None


def _not_a_file_error(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is a folder, and a file is to be there: move it away")


def parse_json_object(text: bytes, source: Path | str) -> dict[str, Any]:
    """Parse a JSON object; error messages name its ``source``. Raises: CheckpointError if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged ({error}): restore it, or begin anew with run.fresh=true") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source} is damaged (an object is expected, this is {type(value).__name__}): restore it, or begin anew "
            f"with run.fresh=true"
        )
    return value


class AppendLog:
    """A file that grows by atomic appends: each is on disk in full, or not at all.

    Content that a full disk rejects stays in memory (``pending``) and is written with the next append that fits, so
    that the run continues without loss. Without an open ``stream`` the file holds lines; the first append creates it.
    """

    def __init__(self, file: Path, stream: FileIO | None = None) -> None:
        self.pending = b""
        self._file, self._stream = file, stream

    def append(self, content: bytes) -> None:
        """Append the pending and the new content, and fsync. Raises: OSError other than a full disk."""
        first_failure = not self.pending
        self.pending += content
        try:
            with nullcontext(self._stream) if self._stream else FileIO(self._file, "a+b") as stream:
                if self._stream is None:
                    _truncate_partial_line(stream)
                _append_or_truncate(stream, self.pending)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            if first_failure:
                _log.warning("%s: no room (%s); new content stays in memory until there is space", self._file, error)
        else:
            self.pending = b""

    def append_json_lines(self, values: Iterable[Any]) -> None:
        """Append the values as JSON lines; without values the file is not touched."""
        if lines := encode_json_lines(values):
            self.append(lines)

    def close(self) -> None:
        """Write the pending content if the disk has space now, and close the stream."""
        with self._stream or nullcontext():
            if self.pending:
                self.append(b"")


def _append_or_truncate(stream: FileIO, content: bytes) -> None:
    """Append all of the content and fsync; on an error restore the file's old size."""
    # SEEK_END, because a failed append leaves the position past the end of the truncated file.
    size = os.lseek(stream.fileno(), 0, os.SEEK_END)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(stream.fileno(), remaining) :]
        os.fsync(stream.fileno())
    except OSError:
        os.ftruncate(stream.fileno(), size)
        raise


def _truncate_partial_line(stream: FileIO) -> None:
    """Remove a last line that a kill cut short: a line appended to it would be unreadable."""
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
        os.ftruncate(stream.fileno(), os.pread(stream.fileno(), size, 0).rfind(b"\n") + 1)


@contextmanager
def best_effort(description: str | Path) -> Iterator[None]:
    """Wrap the writing of an optional file: a full disk causes a warning instead of an error."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        _log.warning("%s is not written: %s", description, error.strerror)


def free_bytes_and_mount(path: Path) -> tuple[int, Path]:
    """Return the free bytes of the file system that holds (or will hold) a path, and its mount point.

    Free means available to this user.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    while not folder.is_mount():
        folder = folder.parent
    return stats.f_bavail * stats.f_frsize, folder


def disk_shortage(path: Path, required_bytes: int) -> str | None:
    """Return a message if a file system has fewer than ``required_bytes`` free, else None.

    A quota is not visible here: it shows when a file's space is allocated.
    """
    free, mount = free_bytes_and_mount(path)
    if free >= required_bytes:
        return None
    return (
        f"{path} has {format_bytes(free)} left (on {mount}) and a checkpoint takes {format_bytes(required_bytes)}; "
        f"make room, or set run.dir to another disk"
    )


def format_bytes(num_bytes: int) -> str:
    """Return a size in MB or GB, in powers of ten as in ``df -H``."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def list_tree(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all folders, this one included and after those in it, and all files in them. Raises: OSError.

    Listings tell folders from files: a checkpoint of a thousand ranks takes one call, not a stat of each file.
    """
    folders: list[Path] = []
    files: list[Path] = []

    def stop(error: OSError) -> None:
        raise error

    for root, _, names in os.walk(folder, topdown=False, onerror=stop):
        folders.append(Path(root))
        files += [Path(root) / name for name in names]
    return folders, files


def draft_path(folder: Path) -> Path:
    """Return the path of a folder's draft: beside the folder, so that the rename stays on one file system."""
    return folder.with_name(f".draft-{folder.name}")


def publish_draft(draft: Path, folder: Path) -> None:
    """Rename a finished draft to its folder; an older folder of that name is removed only after the rename."""
    for subfolder in list_tree(draft)[0]:
        fsync(subfolder)
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old)
    else:
        draft.rename(folder)
    fsync(folder.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder; publish it if the block succeeds, else remove it."""
    draft = draft_path(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            fsync(file)
        publish_draft(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
