"""A stalled read is abandoned; a read with progress may take any time."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from foveal.errors import StorageUnreachableError
from foveal.timeouts import call_with_timeout, read_with_timeout


def test_what_a_call_returns_and_raises_is_ours() -> None:
    assert call_with_timeout(5, lambda: threading.current_thread() is not threading.main_thread())
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(5, lambda: 1 // 0)


def test_what_never_answers_is_named(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "manifest.json")
    began = time.monotonic()
    with pytest.raises(
        StorageUnreachableError, match=rf"{pipe} cannot be read \(no answer within 0.2 s\): check that its storage"
    ):
        read_with_timeout(pipe, 0.2, pipe.read_bytes)
    assert time.monotonic() - began < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "foveal-within")


def test_slow_storage_is_waited_for() -> None:
    def slow() -> int:
        end = time.monotonic() + 0.6
        return sum(1 for _ in iter(lambda: time.monotonic() < end, False))

    assert call_with_timeout(0.2, slow, extend_while_busy=True) > 0


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ESTALE, StorageUnreachableError), (errno.EIO, StorageUnreachableError), (errno.ENOENT, OSError)],
)
def test_storage_that_says_it_is_away(number: int, kind: type[Exception], tmp_path: Path) -> None:
    def read() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind):
        read_with_timeout(tmp_path, 5, read)
