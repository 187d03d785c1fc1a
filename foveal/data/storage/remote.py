"""One folder behind a URL. Every call ends: it is bounded in time, tried again, and then fails with a sentence."""

import asyncio
import datetime as dt
import email.utils
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import IO, Any

from foveal.errors import DataError, StorageUnreachableError
from foveal.redact import redact_urls

_log = logging.getLogger(__name__)

CHUNK_BYTES = (
    1 << 23
)  # bytes asked for at once where a whole file is wanted: few requests, and soon seen when one stalls
MAX_ATTEMPTS = 5
_FIRST_WAIT = 0.5  # seconds before the second attempt; then five times as long each time, to ride out a short outage
_BLOCK = 1 << 20  # bytes that `open` reads ahead: what a request costs in time, an object store sends in 1 to 2 MB
_GRACE = 1.0  # seconds that a call may outlive its own limit before it is given up from outside

_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_REFUSALS = (401, 403, 404, 410)  # HTTP: no credentials, forbidden, not there, gone
_MODIFIED = ("LastModified", "Last-Modified", "mtime", "updated")  # what drivers call it


class RemoteNotFoundError(DataError):
    """A file or folder that does not exist, or that these credentials may not read: asking again cannot help."""


class RemoteFolder:
    """A folder behind a URL that fsspec has a driver for (s3, gs, http, https, file). Serves any number of threads.

    folder: as given; patience: seconds within which every call ends. One request has an eighth of them.
    Raises: DataError if no driver is installed; from all methods: NotThere, or DataError after the last attempt.
    """

    def __init__(self, folder: str, timeout: float) -> None:
        import fsspec  # only data behind URLs needs it: 0.1 s of import

        self.folder = folder.rstrip("/")
        self.timeout = timeout
        protocol = folder.partition("://")[0]
        try:
            self._filesystem, root = fsspec.core.url_to_fs(self.folder)
        except ImportError:
            package = _DRIVERS.get(protocol)
            if package is None:
                raise
            raise DataError(
                f"{redact_urls(folder)} needs the package {package}, which is not installed: `pip install {package}`"
            ) from None
        except ValueError as error:
            raise DataError(f"{redact_urls(folder)} cannot be opened ({error})") from None
        self._root, mark, query = root.partition("?") if protocol in ("http", "https") else (root, "", "")
        self._root, self._query = self._root.rstrip("/"), mark + query  # a signature is of every file in the folder
        self._ignores_range = False
        self._modified: dict[str, float | None] = {}  # as the last listing says

    def display_path(self, name: str = "") -> str:
        """The URL of a file, for sentences: without credentials."""
        folder = self.folder.removesuffix(self._query).rstrip("/")
        return redact_urls(f"{folder}/{name}".rstrip("/"))

    def file_sizes(self) -> dict[str, int | None]:
        """The files of the folder and their bytes; None where the server does not say (HTTP)."""

        def listed() -> Any:
            self._filesystem.invalidate_cache()
            try:
                return self._call_driver("ls", f"{self._root}{self._query}", detail=True)
            finally:
                self._filesystem.invalidate_cache()  # or `size` would answer from it, whatever became of the file

        found = {
            entry["name"].rsplit("/", 1)[-1]: entry for entry in self._retry("", listed) if entry["type"] == "file"
        }
        if not found and self.folder.startswith("http"):
            raise RemoteNotFoundError(f"{self.display_path()}: the server does not list what is there")
        self._modified = {name: _parse_modified_time(entry) for name, entry in found.items()}
        return {name: entry.get("size") for name, entry in found.items()}

    def file_size(self, name: str) -> int:
        """Bytes of a file."""
        size = self._retry(name, lambda: self._call_driver("info", self._path(name))).get("size")
        if size is None:
            raise DataError(f"{self.display_path(name)}: the server does not say how large it is")
        return size

    def modified_time(self, name: str) -> float | None:
        """When a file was written, in seconds since 1970, or None if the server does not say."""
        return self._modified.get(name) or _parse_modified_time(
            self._retry(name, lambda: self._call_driver("info", self._path(name)))
        )

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes start..stop-1 of a file that has as many."""
        return self._read_from(name, start, stop)[: stop - start]

    def iter_chunks(self, name: str, size: int) -> Iterator[bytes]:
        """A whole file of ``size`` bytes from its start, in pieces."""
        at = 0
        while at < size:
            stop = size if self._ignores_range else min(at + CHUNK_BYTES, size)
            data = self._read_from(name, at, stop)[: size - at]
            yield data
            at += len(data)

    def open_file(self, name: str) -> IO[bytes]:
        """A file to walk through: seekable, read ahead in blocks of 1 MiB."""
        return io.BufferedReader(_RemoteStream(self, name, self.file_size(name)), _BLOCK)

    def _read_from(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from ``start``: up to ``stop``, or further if the server sends the file whatever it is asked for."""
        if start >= stop:
            return b""

        def asked() -> bytes:
            data = self._call_driver("cat_file", self._path(name), start=start, end=stop)
            if len(data) > stop - start:
                self._ignores_range = True
                data = data[start:]
            if len(data) < stop - start:
                raise EOFError(f"{stop - start} bytes from {start} were asked for, {len(data)} came")
            return data

        return self._retry(name, asked)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{self._query}"

    def _retry(self, name: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, if need be at a later attempt."""
        wait = _FIRST_WAIT
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:
                if isinstance(error, ImportError):
                    raise
                if _is_permanent(error):
                    raise RemoteNotFoundError(
                        f"{self.display_path(name)} is not there or may not be read ({_format_error(error)})"
                    ) from None
                if attempt == MAX_ATTEMPTS:
                    raise StorageUnreachableError(
                        f"{self.display_path(name)} cannot be read, {MAX_ATTEMPTS} attempts failed ({_format_error(error)}): "
                        f"see that the server answers (all of it within {self.timeout:g} s, in training data.patience_seconds)"
                    ) from None
                _log.warning(
                    "%s: attempt %d of %d failed (%s)",
                    self.display_path(name),
                    attempt,
                    MAX_ATTEMPTS,
                    _format_error(error),
                )
            time.sleep(min(wait, self.timeout / 16))
            wait *= 5
        raise AssertionError

    def _call_driver(self, method: str, *args: Any, **settings: Any) -> Any:
        """Call a method of the driver and wait for it no longer than an eighth of the patience."""
        limit = self.timeout / 8
        if self._filesystem.async_impl:
            coroutine = asyncio.wait_for(getattr(self._filesystem, f"_{method}")(*args, **settings), limit)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)
        else:
            future = _run_in_thread(lambda: getattr(self._filesystem, method)(*args, **settings))
            limit -= _GRACE
        try:
            return future.result(limit + _GRACE)
        except TimeoutError as error:
            future.cancel()
            raise TimeoutError(str(error) or f"no answer within {self.timeout / 8:g} s") from None


class _RemoteStream(io.RawIOBase):
    """A remote file as a raw stream."""

    def __init__(self, remote: RemoteFolder, name: str, size: int) -> None:
        self._remote, self._name, self._size, self._at = remote, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._remote.read_range(self._name, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _run_in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run a call that nothing can interrupt where it may be left behind."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - it is the caller's, who waits for it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="foveal-remote", daemon=True).start()
    return future


def _is_permanent(error: BaseException) -> bool:
    """Whether a server said no, rather than nothing."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and type(cause).__module__.startswith("aiohttp"):
        return _is_permanent(cause)  # fsspec calls every failure of a look at an HTTP file "not found"
    if type(error).__name__ == "NoCredentialsError" or getattr(error, "status", None) in _REFUSALS:
        return True
    return isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)


def _format_error(error: BaseException) -> str:
    """One line about an error, without credentials."""
    text = redact_urls(" ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _parse_modified_time(entry: dict[str, Any]) -> float | None:
    """When a file was written, from what a driver tells of it."""
    moment = next((entry[key] for key in _MODIFIED if entry.get(key)), None)
    if isinstance(moment, str):
        iso = moment[:4].isdigit()
        moment = dt.datetime.fromisoformat(moment) if iso else email.utils.parsedate_to_datetime(moment)
    return moment.timestamp() if isinstance(moment, dt.datetime) else moment
