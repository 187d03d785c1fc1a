"""Waiting for what may never answer. A call that hangs cannot be interrupted; it can be left behind."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foveal.errors import StorageUnreachableError

T = TypeVar("T")
DEFAULT_STALL_TIMEOUT = 600.0  # seconds, as data.patience_seconds has it by default
STORAGE_AWAY_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENOTCONN}
_LOOKS = 10  # at the clock of the thread that waits, within the patience


def read_with_timeout(source: Path | str, stall_timeout: float, read: Callable[[], T]) -> T:
    """What a read of a file or folder returns or raises; ``seconds``: how long it may stand still.

    Raises: Unreachable that names the place, where storage does not answer or says that it is away.
    """
    try:
        return call_with_timeout(stall_timeout, read, extend_while_busy=True)
    except TimeoutError as error:
        raise StorageUnreachableError(
            f"{source} cannot be read ({error}): see that its storage answers (data.patience_seconds says how long to wait)"
        ) from None
    except OSError as error:
        if error.errno not in STORAGE_AWAY_ERRNOS:
            raise
        raise StorageUnreachableError(
            f"{source} cannot be read ({error.strerror}): see that its storage answers"
        ) from None


def call_with_timeout(timeout: float, call: Callable[[], T], *, extend_while_busy: bool = False) -> T:
    """What a call returns or raises, in a thread of its own, if it comes back in time.

    while_busy: a call that does not stand still is waited for longer. It stands still while its thread takes no time of a
    processor: a large file on slow storage takes some for every piece.
    The thread does not keep the process from its end. Raises: TimeoutError; the call is then left behind.
    """
    came: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            came.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            failed.append(error)

    thread = threading.Thread(target=run, name="foveal-within", daemon=True)
    thread.start()
    worked, until = 0.0, time.monotonic() + timeout
    while thread.is_alive() and time.monotonic() < until:
        thread.join(timeout / _LOOKS)
        if extend_while_busy and thread.is_alive() and (now := _thread_cpu_seconds(thread)) != worked:
            worked, until = now, time.monotonic() + timeout
    if failed:
        raise failed[0]
    if not came:
        raise TimeoutError(f"no answer within {timeout:g} s")
    return came[0]


def _thread_cpu_seconds(thread: threading.Thread) -> float:
    """What a thread has worked so far; 0 for one that has just ended."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:
        return 0.0
