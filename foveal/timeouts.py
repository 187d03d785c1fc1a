"""Time limits for calls that may hang. A hanging call cannot be interrupted; its thread is abandoned."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foveal.errors import StorageUnreachableError

T = TypeVar("T")
DEFAULT_STALL_TIMEOUT = 600.0  # seconds; the default of data.stall_timeout_seconds
STORAGE_AWAY_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENOTCONN}
_POLLS_PER_TIMEOUT = 10
_reading_thread = threading.local()  # in a thread of ``read_with_timeout``: what it reads, the innermost last


def read_with_timeout(source: Path | str, stall_timeout: float, read: Callable[[], T]) -> T:
    """Return the result of reading a file or folder; ``stall_timeout``: seconds without progress before an error.

    Calls inside of ``read`` share its thread and its limit: files that are read in a row start one thread, and an error
    names the one that does not answer.
    Raises: StorageUnreachableError that names the source if storage does not answer or is offline; errors of ``read``.
    """
    outer_sources: list[Path | str] | None = getattr(_reading_thread, "sources", None)
    if outer_sources is not None:
        return _read_named(source, read, outer_sources)
    sources: list[Path | str] = []

    def read_in_thread() -> T:
        _reading_thread.sources = sources
        return _read_named(source, read, sources)

    try:
        return call_with_timeout(stall_timeout, read_in_thread, extend_while_busy=True)
    except TimeoutError as error:
        raise StorageUnreachableError(
            f"{sources[-1] if sources else source} cannot be read ({error}): check that its storage answers "
            f"(data.stall_timeout_seconds sets the time limit)"
        ) from None


def _read_named(source: Path | str, read: Callable[[], T], sources: list[Path | str]) -> T:
    """Read a source, which is the last of ``sources`` meanwhile."""
    sources.append(source)
    try:
        return read()
    except OSError as error:
        if error.errno not in STORAGE_AWAY_ERRNOS:
            raise
        raise StorageUnreachableError(
            f"{source} cannot be read ({error.strerror}): check that its storage answers"
        ) from None
    finally:
        sources.pop()


def call_with_timeout(timeout: float, call: Callable[[], T], *, extend_while_busy: bool = False) -> T:
    """Run a call in a daemon thread and return its result within ``timeout`` seconds.

    extend_while_busy: CPU time of the thread restarts the timeout; a large file on slow storage uses some for every
    block it reads. Raises: TimeoutError, with the call abandoned; errors of the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="foveal-within", daemon=True)
    thread.start()
    cpu_seconds = 0.0
    deadline = time.monotonic() + timeout
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(timeout / _POLLS_PER_TIMEOUT)
        if extend_while_busy and thread.is_alive() and (now := _thread_cpu_seconds(thread)) != cpu_seconds:
            cpu_seconds = now
            deadline = time.monotonic() + timeout
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {timeout:g} s")
    return results[0]


def _thread_cpu_seconds(thread: threading.Thread) -> float:
    """Return the CPU time of a thread in seconds; 0 if the thread has ended."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:
        return 0.0
