"""MLflow's store in an SQLite file: its path, and its creation by one of several runs that start at once.

MLflow creates its tables in place, in dozens of steps without a common transaction. Two processes at once, or a kill in
the middle, leave a file that no MLflow opens again. Here the tables are created in a draft, which is then linked to its
name, so the store is complete or absent. A lock beside it keeps runs from creating the store several times and from
upgrading an older one together, which MLflow does in place. The kernel releases the lock when its process ends. On file
systems without locks the link decides.
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
_SQLITE_HEADER = b"SQLite format 3\x00"
_BAD_PATH_ERRNO = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
_UNSUPPORTED_ERRNO = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK, errno.EINVAL}
_LOCK_TIMEOUT = 120.0  # seconds for another run to create the store
_LOCK_POLL_SECONDS = 0.05


def parse_sqlite_path(uri: str) -> Path | None:
    """Return the file in the URI of an SQLite store; None for another kind of store."""
    match = _URI.fullmatch(uri)
    return Path(match[2]) if match else None


def prepare_store_and_artifacts(uri: str) -> tuple[str, str | None]:
    """Return an SQLite store's absolute URI and the URI of its artifacts beside it; a server's URI is returned as it is.

    Raises: StoreRefusedError if the folder cannot be created.
    """
    match = _URI.fullmatch(uri)
    if not match:
        return uri, None
    prefix, name, query = match.groups()
    if name in ("", ":memory:"):
        raise StoreRefusedError(
            "tracking.uri names no file, and a store in memory ends with its run: sqlite:///FOLDER/mlflow.db"
        )
    file = Path(name).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _path_error(file, error) from None
    return f"{prefix}{file}{query}", (file.parent / "mlartifacts").as_uri()


def resolve_store_of_run(uri: str, recorded_file: str | None) -> str:
    """Return the URI of the store in which a run goes on, wherever its next attempt is started.

    A relative SQLite path starts in the working directory of the attempt that created the run in MLflow:
    ``recorded_file`` is the absolute path of then, None if there is none. It is kept while it ends with the path of the
    URI and exists; another path or a server is another store.
    """
    match = _URI.fullmatch(uri)
    if not match or not match[2] or recorded_file is None:
        return uri
    prefix, name, query = match.groups()
    stated, recorded = Path(name), Path(recorded_file)
    is_elsewhere = not stated.is_absolute() and stated.absolute() != recorded
    is_same = recorded.parts[-len(stated.parts) :] == stated.parts
    return f"{prefix}{recorded}{query}" if is_elsewhere and is_same and recorded.exists() else uri


@contextmanager
def lock_store(file: Path, create_if_missing: Callable[[Path], object]) -> Iterator[None]:
    """Hold the lock of a store, created with ``create(path)`` if it does not exist.

    Raises: StoreRefusedError if the path cannot hold a store, or holds something else; TimeoutError if another run
    holds the lock for two minutes.
    """
    with _lock_file(file):
        if not file.exists():
            _create_store(file, create_if_missing)
        elif file.is_dir() or not os.access(file, os.R_OK | os.W_OK):
            raise StoreRefusedError(f"{file} cannot be written: make it writable, or set tracking.uri to another place")
        elif _read_header(file) not in (b"", _SQLITE_HEADER):  # empty: another run has only begun to create it
            raise StoreRefusedError(f"{file} is no SQLite database: set tracking.uri to another place")
        yield


@contextmanager
def _lock_file(file: Path) -> Iterator[None]:
    try:
        lock = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not file.exists():
            raise _path_error(file, error) from None
        yield  # the folder is read-only: nothing can be created or upgraded here
        return
    try:
        _acquire_lock(lock, file)
        yield
    finally:
        os.close(lock)


def _acquire_lock(lock: int, file: Path) -> None:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file} is held by another run that makes or upgrades it") from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as error:
            if error.errno in _UNSUPPORTED_ERRNO:
                return
            raise
        else:
            return


def _read_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_SQLITE_HEADER))


def _create_store(file: Path, create: Callable[[Path], object]) -> None:
    """Create a store in a draft and link it to its name, unless another run was faster."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}.draft")
    try:
        create(draft)
        fsync(draft)
        _link_into_place(draft, file)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            draft.with_name(draft.name + suffix).unlink(missing_ok=True)
    fsync(file.parent)


def _link_into_place(draft: Path, file: Path) -> None:
    with contextlib.suppress(FileExistsError):
        try:
            file.hardlink_to(draft)
        except OSError as error:
            if error.errno not in _UNSUPPORTED_ERRNO:
                raise
            if not file.exists():  # a file system without links has the lock only
                draft.rename(file)


def _path_error(file: Path, error: OSError) -> Exception:
    if error.errno not in _BAD_PATH_ERRNO:
        return error
    return StoreRefusedError(
        f"{file} cannot be made ({error.strerror}): set tracking.uri to a place that can be written"
    )
