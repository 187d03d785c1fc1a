"""Folder behind a URL. Every call has a time limit and a number of attempts, and then raises DataError."""

import asyncio
import contextlib
import datetime as dt
import email.utils
import functools
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import IO, Any

from foveal.errors import DataError, StorageUnreachableError
from foveal.redact import redact_url_secrets

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 23  # bytes per request for a complete file: few requests, and a stalled request shows soon
MAX_ATTEMPTS = 5
_FIRST_WAIT = 0.5  # seconds before the second attempt, then 5 times longer each time: outlasts a short outage
_BLOCK = 1 << 20  # read-ahead of `open_file`; an object store sends 1 to 2 MB in the time that a request costs
_GRACE = 1.0  # seconds that a call may exceed its own limit before the waiting thread abandons it

_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_REFUSALS = (401, 403, 404, 410)  # HTTP: unauthorized, forbidden, not found, gone
_MODIFIED = ("LastModified", "Last-Modified", "mtime", "updated")  # the drivers' keys for it
_MAX_SUB_FOLDERS = 10  # looked at, each with a request
_ETAG = ("ETag", "etag")


class PermanentRemoteError(DataError):
    """A file or folder does not exist, or these credentials may not read it; a retry cannot help."""


class RemoteFolder:
    """Folder behind a URL that fsspec has a driver for (s3, gs, http, https, file). Thread-safe.

    timeout: seconds within which every call ends, with all its attempts; one attempt may take an eighth of them.
    Raises: DataError if no driver is installed. From all methods: RemoteNotFoundError, or StorageUnreachableError after
    the last attempt.
    """

    def __init__(self, folder: str, all_attempts_timeout: float) -> None:
        import fsspec  # takes 0.1 s; only remote data needs it

        self.folder = folder.rstrip("/")
        self.all_attempts_timeout = all_attempts_timeout
        protocol = folder.partition("://")[0]
        try:
            self._filesystem, root = fsspec.core.url_to_fs(self.folder)
        except ImportError:
            package = _DRIVERS.get(protocol)
            if package is None:
                raise
            raise DataError(
                f"{redact_url_secrets(folder)} needs the package {package}, which is not installed: `pip install {package}`"
            ) from None
        except ValueError as error:
            raise DataError(f"{redact_url_secrets(folder)} cannot be opened ({error})") from None
        self._root, mark, query = root.partition("?") if protocol in ("http", "https") else (root, "", "")
        self._root = self._root.rstrip("/")
        self._query = mark + query  # the signature of a signed URL holds for every file of the folder
        self.ignores_range = False
        self._modified: dict[str, float | None] = {}  # from the last listing
        self._sub_folders: list[str] = []  # likewise

    def display_path(self, name: str = "") -> str:
        """Return the URL of a file without credentials, for messages."""
        folder = self.folder.removesuffix(self._query).rstrip("/")
        return redact_url_secrets(f"{folder}/{name}".rstrip("/"))

    def file_sizes(self) -> dict[str, int | None]:
        """Return the files of the folder and their sizes in bytes; None if the server does not report one (HTTP)."""

        def list_folder() -> Any:
            self._filesystem.invalidate_cache()
            try:
                return self._call_driver("ls", f"{self._root}{self._query}", detail=True)
            finally:
                self._filesystem.invalidate_cache()  # `file_size` must not answer from the cache

        listing = self._retry("", list_folder)
        entries = {entry["name"].rsplit("/", 1)[-1]: entry for entry in listing if entry["type"] == "file"}
        folders = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in listing if entry["type"] == "directory"]
        self._sub_folders = [folder for folder in folders if not folder.startswith(".")]
        if not entries and self.folder.startswith("http"):
            raise PermanentRemoteError(f"{self.display_path()}: the server does not list what is there")
        self._modified = {name: _parse_modified_time(entry) for name, entry in entries.items()}
        return {name: entry.get("size") for name, entry in entries.items()}

    def walk_files(self) -> list[str]:
        """Return the files in the folder and in all folders below it, by their paths from here, without hidden ones.

        Over HTTP, whose links lead anywhere, those of the folder alone.
        """
        if self.folder.startswith("http"):
            return list(self.file_sizes())
        paths = self._retry("", lambda: self._call_driver("find", self._root))
        names = [path.removeprefix(self._root).lstrip("/") for path in paths]
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]

    def sub_folder_files(self) -> dict[str, list[str]]:
        """Return some of the files in the sub-folders of the last listing, as far as they can be listed.

        None over HTTP, whose links lead anywhere.
        """
        files: dict[str, list[str]] = {}
        for folder in [] if self.folder.startswith("http") else self._sub_folders[:_MAX_SUB_FOLDERS]:
            with contextlib.suppress(DataError):
                files[folder] = self._retry(folder, functools.partial(self._list_names, folder))
        return files

    def _list_names(self, folder: str) -> list[str]:
        return [path.rsplit("/", 1)[-1] for path in self._call_driver("ls", self._path(folder), detail=False)]

    def file_size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        size = self._retry(name, lambda: self._call_driver("info", self._path(name))).get("size")
        if size is None:
            raise DataError(f"{self.display_path(name)}: the server does not say how large it is")
        return size

    def modified_time(self, name: str) -> float | None:
        """Return the modification time in seconds since 1970; None if the server does not report it."""
        return self._modified.get(name) or _parse_modified_time(
            self._retry(name, lambda: self._call_driver("info", self._path(name)))
        )

    def etag(self, name: str) -> str | None:
        """Return the server's ETag of a file, which changes with its bytes; None if the server does not report it."""
        entry = self._retry(name, lambda: self._call_driver("info", self._path(name)))
        return next((str(entry[key]) for key in _ETAG if entry.get(key)), None)

    def read_up_to(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file."""
        return self._read_from(name, start, stop)[: stop - start]

    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield a file of ``size`` bytes in chunks."""
        offset = 0
        while offset < size:
            stop = size if self.ignores_range else min(offset + CHUNK_BYTES, size)
            data = self._read_from(name, offset, stop)[: size - offset]
            yield data
            offset += len(data)

    def open_file(self, name: str) -> IO[bytes]:
        """Return a seekable stream with a read-ahead of 1 MiB."""
        return io.BufferedReader(_RemoteStream(self, name, self.file_size(name)), _BLOCK)

    def _read_from(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), or more if the server ignores byte ranges and sends the complete file."""
        if start >= stop:
            return b""

        def fetch() -> bytes:
            data = self._call_driver("cat_file", self._path(name), start=start, end=stop)
            if len(data) > stop - start:
                self.ignores_range = True
                data = data[start:]
            if len(data) < stop - start:
                raise EOFError(f"{stop - start} bytes from {start} were asked for, {len(data)} came")
            return data

        return self._retry(name, fetch)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{self._query}"

    def _retry(self, name: str, call: Callable[[], Any]) -> Any:
        """Return the result of ``call``, which is repeated after transient errors."""
        wait = _FIRST_WAIT
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:
                if isinstance(error, ImportError):
                    raise
                if _is_permanent(error):
                    raise PermanentRemoteError(
                        f"{self.display_path(name)} is not there or may not be read ({_format_error(error)})"
                    ) from None
                if attempt == MAX_ATTEMPTS:
                    raise StorageUnreachableError(
                        f"{self.display_path(name)} cannot be read, {MAX_ATTEMPTS} attempts failed "
                        f"({_format_error(error)}): see that the server answers (all of it within {self.all_attempts_timeout:g} s, "
                        f"in training data.stall_timeout_seconds)"
                    ) from None
                _log.warning(
                    "%s: attempt %d of %d failed (%s)",
                    self.display_path(name),
                    attempt,
                    MAX_ATTEMPTS,
                    _format_error(error),
                )
            time.sleep(min(wait, self.all_attempts_timeout / 16))
            wait *= 5
        raise AssertionError

    def _call_driver(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the fsspec driver; wait at most an eighth of ``timeout``."""
        limit = self.all_attempts_timeout / 8
        if self._filesystem.async_impl:
            coroutine = asyncio.wait_for(getattr(self._filesystem, f"_{method}")(*args, **kwargs), limit)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)
        else:
            future = _run_in_thread(lambda: getattr(self._filesystem, method)(*args, **kwargs))
            limit -= _GRACE
        try:
            return future.result(limit + _GRACE)
        except TimeoutError as error:
            future.cancel()
            raise TimeoutError(str(error) or f"no answer within {self.all_attempts_timeout / 8:g} s") from None


class _RemoteStream(io.RawIOBase):
    """Remote file as a raw stream."""

    def __init__(self, remote: RemoteFolder, name: str, size: int) -> None:
        self._remote, self._name, self._size, self._position = remote, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._remote.read_up_to(self._name, self._position, min(self._position + len(buffer), self._size))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _run_in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run an uninterruptible call in a daemon thread, which the caller may abandon."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="foveal-remote", daemon=True).start()
    return future


def _is_permanent(error: BaseException) -> bool:
    """Whether the error is final (refused, missing), so that a retry cannot help."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and type(cause).__module__.startswith("aiohttp"):
        return _is_permanent(cause)  # fsspec turns every failed HTTP request for a file's info into FileNotFoundError
    if type(error).__name__ == "NoCredentialsError" or getattr(error, "status", None) in _REFUSALS:
        return True
    return isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)


def _format_error(error: BaseException) -> str:
    """Return one line about an error, without credentials."""
    text = redact_url_secrets(" ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _parse_modified_time(entry: dict[str, Any]) -> float | None:
    """Return the modification time in seconds since 1970 from a driver's file entry; None if absent."""
    moment = next((entry[key] for key in _MODIFIED if entry.get(key)), None)
    if isinstance(moment, str):
        is_iso = moment[:4].isdigit()
        moment = dt.datetime.fromisoformat(moment) if is_iso else email.utils.parsedate_to_datetime(moment)
    return moment.timestamp() if isinstance(moment, dt.datetime) else moment
