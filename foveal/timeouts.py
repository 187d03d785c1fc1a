"""Waiting for what may never answer. A call that hangs cannot be interrupted; it can be left behind."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foveal.errors import Unreachable

T = TypeVar("T")
PATIENCE = 600.0  # seconds, as data.patience_seconds has it by default
AWAY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENOTCONN}
_LOOKS = 10  # at the clock of the thread that waits, within the patience


def answered(place: Path | str, seconds: float, read: Callable[[], T]) -> T:
    """What a read of a file or folder returns or raises; ``seconds``: how long it may stand still.

    Errors: Unreachable that names the place, where storage does not answer or says that it is away.
    """
    try:
        return within(seconds, read, while_busy=True)
    except TimeoutError as error:
        raise Unreachable(
            f"{place} cannot be read ({error}): see that its storage answers (data.patience_seconds says how long to wait)"
        ) from None
    except OSError as error:
        if error.errno not in AWAY:
            raise
        raise Unreachable(f"{place} cannot be read ({error.strerror}): see that its storage answers") from None


def within(seconds: float, call: Callable[[], T], *, while_busy: bool = False) -> T:
    """What a call returns or raises, in a thread of its own, if it comes back in time.

    while_busy: a call that does not stand still is waited for longer. It stands still while its thread takes no time of a
    processor: a large file on slow storage takes some for every piece.
    The thread does not keep the process from its end. Errors: TimeoutError; the call is then left behind.
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
    worked, until = 0.0, time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < until:
        thread.join(seconds / _LOOKS)
        if while_busy and thread.is_alive() and (now := _processor_seconds(thread)) != worked:
            worked, until = now, time.monotonic() + seconds
    if failed:
        raise failed[0]
    if not came:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return came[0]


def _processor_seconds(thread: threading.Thread) -> float:
    """What a thread has worked so far; 0 for one that has just ended."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:
        return 0.0
