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

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room, no quota, no file so large
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


def force(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:  # some file systems cannot force the names in a folder
            raise
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new, never a part; on disk when this returns.

    The draft has the process's number, so that two processes that write the same file spoil neither.
    Errors: OSError; CheckpointError where a folder has the name.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(content)
        force(draft)
        draft.replace(file)
    except IsADirectoryError:
        raise _no_file(file) from None
    finally:
        draft.unlink(missing_ok=True)
    force(file.parent)


def json_bytes(value: Any) -> bytes:
    """JSON as foveal's files have it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def json_lines(values: Iterable[Any]) -> bytes:
    """Each value as a line of JSON."""
    return b"".join(f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values)


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(file, json_bytes(value))


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON, as foveal writes them into a run directory.

    Errors: FileNotFoundError; CheckpointError, one sentence, where it cannot be read or is no such object.
    """
    return object_of(content_of(file), file)


def content_of(file: Path) -> bytes:
    """The bytes of a file of a run directory. Errors: OSError; CheckpointError where a folder has its name."""
    try:
        return file.read_bytes()
    except IsADirectoryError:
        raise _no_file(file) from None


def _no_file(place: Path) -> CheckpointError:
    return CheckpointError(f"{place} is a folder, and a file is to be there: move it away")


def object_of(text: bytes, where: Path | str) -> dict[str, Any]:
    """The object that a text of JSON is; ``where`` it comes from. Errors: CheckpointError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged ({error}): restore it, or begin anew with run.fresh=true") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} is damaged (an object is expected, this is {type(value).__name__}): restore it, or begin anew with "
            f"run.fresh=true"
        )
    return value


class Growing:
    """A file that grows at its end: what was added is on disk whole, or not at all.

    What a full disk has no room for is ``owed``: kept in memory, and written with the next addition that finds room, so
    that a run goes on and loses nothing. Without an open ``stream`` the file is one of lines, made with the first.
    """

    def __init__(self, file: Path, stream: FileIO | None = None) -> None:
        self.owed = b""
        self._file, self._stream = file, stream

    def add(self, content: bytes) -> None:
        """Append all that is owed and this, and force it to disk. Errors: OSError where the disk is not just full."""
        news, self.owed = not self.owed, self.owed + content
        try:
            with nullcontext(self._stream) if self._stream else FileIO(self._file, "a+b") as stream:
                if self._stream is None:
                    _cut_short(stream)
                _append(stream, self.owed)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if news:
                _log.warning(
                    "%s: no room (%s); what belongs there is kept in memory until there is some", self._file, error
                )
        else:
            self.owed = b""

    def add_json(self, values: Iterable[Any]) -> None:
        """Append each value as a line of JSON; without any, the file is not touched."""
        if lines := json_lines(values):
            self.add(lines)

    def close(self) -> None:
        """Add what is owed, if there is room now, and close the stream."""
        with self._stream or nullcontext():
            if self.owed:
                self.add(b"")


def _append(stream: FileIO, content: bytes) -> None:
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


def _cut_short(stream: FileIO) -> None:
    """Let a last line go that a kill has cut short: it was never said, and behind it the next one would be unreadable."""
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
        os.ftruncate(stream.fileno(), os.pread(stream.fileno(), size, 0).rfind(b"\n") + 1)


@contextmanager
def dispensable(what: str | Path) -> Iterator[None]:
    """Around writing what a run can do without: on a full disk there is a warning and no such file."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        _log.warning("%s is not written: %s", what, error.strerror)


def free_bytes(place: Path) -> tuple[int, Path]:
    """What is left for us on the file system that holds a place (or will hold it), and where that is mounted."""
    there = place.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    while not there.is_mount():
        there = there.parent
    return found.f_bavail * found.f_frsize, there


def room(place: Path, need: int) -> str | None:
    """A sentence where a file system has less room than ``need`` bytes; nothing where it has enough.

    A quota is not seen here: it shows when room for a file is taken.
    """
    free, mount = free_bytes(place)
    if free >= need:
        return None
    return (
        f"{place} has {in_gigabytes(free)} left (on {mount}) and a checkpoint takes {in_gigabytes(need)}; make room, or set "
        f"run.dir to another disk"
    )


def in_gigabytes(count: int) -> str:
    """Bytes for a reader, in powers of ten as disks are sold and ``df -H`` counts."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, so that the rename stays on one file system."""
    return folder.with_name(f".draft-{folder.name}")


def publish(draft: Path, folder: Path) -> None:
    """Give a finished draft its name; what had the name before is gone only after the new one is whole on disk."""
    for names in [*(each for each in draft.rglob("*") if each.is_dir()), draft]:
        force(names)
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old)
    else:
        draft.rename(folder)
    force(folder.parent)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder; publish it if the block ends well, remove it if not."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            force(file)
        publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
