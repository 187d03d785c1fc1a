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


def read_with_timeout(source: Path | str, stall_timeout: float, read: Callable[[], T]) -> T:
    """Return the result of reading a file or folder; ``stall_timeout``: seconds without progress before an error.

    Raises: StorageUnreachableError that names the source if storage does not answer or is offline; errors of ``read``.
    """
    try:
        return call_with_timeout(stall_timeout, read, extend_while_busy=True)
    except TimeoutError as error:
        raise StorageUnreachableError(
            f"{source} cannot be read ({error}): check that its storage answers (data.stall_timeout_seconds sets the time "
            f"limit)"
        ) from None
    except OSError as error:
        if error.errno not in STORAGE_AWAY_ERRNOS:
            raise
        raise StorageUnreachableError(
            f"{source} cannot be read ({error.strerror}): check that its storage answers"
        ) from None


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
