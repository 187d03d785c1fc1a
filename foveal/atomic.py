"""Files and folders that exist whole or not at all: written as a draft, forced to disk, named by one rename."""

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

DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room, no quota, no file so large
_CHUNK = 1 << 22
_log = logging.getLogger(__name__)
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system answers that has no such service


def sha256(file: Path) -> str:
    """The digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:  # some file systems cannot force the names in a folder
            raise
    finally:
        os.close(descriptor)


def write_atomic(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new, never a part; on disk when this returns.

    The draft has the process's number, so that two processes that write the same file spoil neither.
    Raises: OSError; CheckpointError where a folder has the name.
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
    """JSON as foveal's files have it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def encode_json_lines(values: Iterable[Any]) -> bytes:
    """Each value as a line of JSON."""
    return b"".join(f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values)


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomic(file, encode_json(value))


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON, as foveal writes them into a run directory.

    Raises: FileNotFoundError; CheckpointError, one sentence, where it cannot be read or is no such object.
    """
    return parse_json_object(read_file_bytes(file), file)


def read_file_bytes(file: Path) -> bytes:
    """The bytes of a file of a run directory. Raises: OSError; CheckpointError where a folder has its name."""
    try:
        return file.read_bytes()
    except IsADirectoryError:
        raise _not_a_file_error(file) from None


def _not_a_file_error(place: Path) -> CheckpointError:
    return CheckpointError(f"{place} is a folder, and a file is to be there: move it away")


def parse_json_object(text: bytes, source: Path | str) -> dict[str, Any]:
    """The object that a text of JSON is; ``where`` it comes from. Raises: CheckpointError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged ({error}): restore it, or begin anew with run.fresh=true") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source} is damaged (an object is expected, this is {type(value).__name__}): restore it, or begin anew with "
            f"run.fresh=true"
        )
    return value


class AppendLog:
    """A file that grows at its end: what was added is on disk whole, or not at all.

    What a full disk has no room for is ``owed``: kept in memory, and written with the next addition that finds room, so
    that a run goes on and loses nothing. Without an open ``stream`` the file is one of lines, made with the first.
    """

    def __init__(self, file: Path, stream: FileIO | None = None) -> None:
        self.pending = b""
        self._file, self._stream = file, stream

    def append(self, content: bytes) -> None:
        """Append all that is owed and this, and force it to disk. Raises: OSError where the disk is not just full."""
        news, self.pending = not self.pending, self.pending + content
        try:
            with nullcontext(self._stream) if self._stream else FileIO(self._file, "a+b") as stream:
                if self._stream is None:
                    _truncate_partial_line(stream)
                _append_or_truncate(stream, self.pending)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            if news:
                _log.warning(
                    "%s: no room (%s); what belongs there is kept in memory until there is some", self._file, error
                )
        else:
            self.pending = b""

    def append_json_lines(self, values: Iterable[Any]) -> None:
        """Append each value as a line of JSON; without any, the file is not touched."""
        if lines := encode_json_lines(values):
            self.append(lines)

    def close(self) -> None:
        """Add what is owed, if there is room now, and close the stream."""
        with self._stream or nullcontext():
            if self.pending:
                self.append(b"")


def _append_or_truncate(stream: FileIO, content: bytes) -> None:
    """All of it or nothing."""
    size = os.lseek(
        stream.fileno(), 0, os.SEEK_END
    )  # also where an addition that failed has left its place behind the end
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(stream.fileno(), rest) :]
        os.fsync(stream.fileno())
    except OSError:
        os.ftruncate(stream.fileno(), size)
        raise


def _truncate_partial_line(stream: FileIO) -> None:
    """Let a last line go that a kill has cut short: it was never said, and behind it the next one would be unreadable."""
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
        os.ftruncate(stream.fileno(), os.pread(stream.fileno(), size, 0).rfind(b"\n") + 1)


@contextmanager
def best_effort(description: str | Path) -> Iterator[None]:
    """Around writing what a run can do without: on a full disk there is a warning and no such file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        _log.warning("%s is not written: %s", description, error.strerror)


def get_free_space(path: Path) -> tuple[int, Path]:
    """What is left for us on the file system that holds a place (or will hold it), and where that is mounted."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    while not there.is_mount():
        there = there.parent
    return found.f_bavail * found.f_frsize, there


def disk_shortage(path: Path, required_bytes: int) -> str | None:
    """A sentence where a file system has less room than ``need`` bytes; nothing where it has enough.

    A quota is not seen here: it shows when room for a file is taken.
    """
    free, mount = get_free_space(path)
    if free >= required_bytes:
        return None
    return (
        f"{path} has {format_bytes(free)} left (on {mount}) and a checkpoint takes {format_bytes(required_bytes)}; make room, or set "
        f"run.dir to another disk"
    )


def format_bytes(num_bytes: int) -> str:
    """Bytes for a reader, in powers of ten as disks are sold and ``df -H`` counts."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def draft_path(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, so that the rename stays on one file system."""
    return folder.with_name(f".draft-{folder.name}")


def publish_draft(draft: Path, folder: Path) -> None:
    """Give a finished draft its name; what had the name before is gone only after the new one is whole on disk."""
    for names in [*(each for each in draft.rglob("*") if each.is_dir()), draft]:
        fsync(names)
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
    """Yield an empty draft folder; publish it if the block ends well, remove it if not."""
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
