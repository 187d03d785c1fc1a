"""MLflow's store in an SQLite file: where it lies, and how runs that begin at once make it once.

MLflow makes its tables in place, in dozens of steps that are no single transaction: two processes at once, or a kill in
the middle, leave a file that no MLflow opens again. Here the tables are made in a file aside, which then gets the name:
that is whole or not there. A lock beside it keeps the runs from making it several times, and from upgrading an older
one together, which MLflow does in place; the lock is the kernel's and ends with its process. Without locks (some network
file systems) the name decides.
"""

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foveal.atomic import fsync
from foveal.tracking.store_errors import StoreRefusedError

_URI = re.compile(r"(sqlite(?:\+\w+)?:///(?:file:(?://(?=/))?)?)([^?]*)(.*)")
_HEAD = b"SQLite format 3\x00"
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NO_SERVICE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK, errno.EINVAL}
_PATIENCE, _LOOKS = 120.0, 0.05  # seconds for another run to make the store, and between two looks at the lock


def parse_sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store, as the URI names it; nothing where the store is another."""
    found = _URI.fullmatch(uri)
    return Path(found[2]) if found else None


def resolve_store_uri(uri: str) -> tuple[str, str | None]:
    """An SQLite store's absolute URI, and the folder of its artifacts beside it; a server decides for itself.

    Raises: Refused where there is no such place.
    """
    found = _URI.fullmatch(uri)
    if not found:
        return uri, None
    before, name, query = found.groups()
    if name in ("", ":memory:"):
        raise StoreRefusedError(
            "tracking.uri names no file, and a store in memory ends with its run: sqlite:///FOLDER/mlflow.db"
        )
    file = Path(name).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _path_error(file, error) from None
    return f"{before}{file}{query}", (file.parent / "mlartifacts").as_uri()


@contextmanager
def lock_store(file: Path, create: Callable[[Path], object]) -> Iterator[None]:
    """Hold the lock of a store, whose file is there: made by ``make``, which writes a store to a path, if it was not.

    Raises: Refused where there is no such place, or something else; TimeoutError where another run holds the lock.
    """
    with _lock_file(file):
        if not file.exists():
            _create_store(file, create)
        elif file.is_dir() or not os.access(file, os.R_OK | os.W_OK):
            raise StoreRefusedError(f"{file} cannot be written: make it writable, or set tracking.uri to another place")
        elif _read_header(file) not in (b"", _HEAD):  # empty: whoever makes it has only begun
            raise StoreRefusedError(f"{file} is no SQLite database: set tracking.uri to another place")
        yield


@contextmanager
def _lock_file(file: Path) -> Iterator[None]:
    try:
        lock = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not file.exists():
            raise _path_error(file, error) from None
        yield  # nothing can be made here, nor upgraded
        return
    try:
        _acquire_lock(lock, file)
        yield
    finally:
        os.close(lock)


def _acquire_lock(lock: int, file: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(f"{file} is held by another run that makes or upgrades it") from None
            time.sleep(_LOOKS)
        except OSError as error:
            if error.errno in _NO_SERVICE:
                return
            raise
        else:
            return


def _read_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_HEAD))


def _create_store(file: Path, make: Callable[[Path], object]) -> None:
    """Give the name to a store that was made aside, unless another has it by now."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}.draft")
    try:
        make(draft)
        fsync(draft)
        _link_into_place(draft, file)
    finally:
        for each in ("", "-journal", "-wal", "-shm"):
            draft.with_name(draft.name + each).unlink(missing_ok=True)
    fsync(file.parent)


def _link_into_place(draft: Path, file: Path) -> None:
    with contextlib.suppress(FileExistsError):
        try:
            file.hardlink_to(draft)
        except OSError as error:
            if error.errno not in _NO_SERVICE:
                raise
            if not file.exists():  # a file system without links; the lock is all there is
                draft.rename(file)


def _path_error(file: Path, error: OSError) -> Exception:
    if error.errno not in _NO_PLACE:
        return error
    return StoreRefusedError(
        f"{file} cannot be made ({error.strerror}): set tracking.uri to a place that can be written"
    )
