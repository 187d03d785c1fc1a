"""Files and folders that exist whole or not at all: written as a draft, forced to disk, named by one rename."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22
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
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(content)
        force(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    force(file.parent)


def json_bytes(value: Any) -> bytes:
    """JSON as foveal's files have it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(file, json_bytes(value))


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a file, and force them to disk."""
    with file.open("a") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


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
