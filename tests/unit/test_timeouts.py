"""A stalled read is abandoned; a read with progress may take any time."""

import errno
import itertools
import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from foveal import timeouts
from foveal.errors import StorageUnreachableError
from foveal.timeouts import call_with_timeout, read_with_timeout


def test_what_a_call_returns_and_raises_is_ours() -> None:
    assert call_with_timeout(60, lambda: threading.current_thread() is not threading.main_thread())
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(60, lambda: 1 // 0)


def test_what_never_answers_is_named(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "manifest.json")
    began = time.monotonic()
    with pytest.raises(
        StorageUnreachableError, match=rf"{pipe} cannot be read \(no answer within 0.2 s\): check that its storage"
    ):
        read_with_timeout(pipe, 0.2, pipe.read_bytes)
    assert time.monotonic() - began < 30
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "foveal-within")


@pytest.mark.parametrize("hangs", [True, False])
def test_files_in_a_row_share_a_thread_and_the_one_that_hangs_is_named(hangs: bool, tmp_path: Path) -> None:
    files, threads = [tmp_path / f"{number}.index" for number in range(5)], set[int]()
    for file in files:
        os.mkfifo(file) if hangs and file is files[3] else file.write_bytes(b"x")

    def read(file: Path) -> bytes:
        threads.add(threading.get_ident())
        return file.read_bytes()

    def read_all() -> list[bytes]:
        return [read_with_timeout(file, 60, partial(read, file)) for file in files]

    if hangs:
        with pytest.raises(StorageUnreachableError, match=rf"{files[3]} cannot be read \(no answer within 0.2 s\)"):
            read_with_timeout(tmp_path, 0.2, read_all)
    else:
        assert read_with_timeout(tmp_path, 60, read_all) == [b"x"] * 5
    assert len(threads) == 1
    assert threads.isdisjoint({threading.get_ident()})


def test_who_hangs_after_the_files_of_a_row_is_named_itself(tmp_path: Path) -> None:
    def read_and_hang() -> None:
        with suppress(FileNotFoundError):
            read_with_timeout(tmp_path / "gone", 60, (tmp_path / "gone").read_bytes)
        threading.Event().wait()

    with pytest.raises(StorageUnreachableError, match=rf"{tmp_path} cannot be read"):
        read_with_timeout(tmp_path, 0.2, read_and_hang)


def test_slow_storage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the timeout in total, and at every look the thread has had some more of a processor."""
    looks, enough = itertools.count(1), threading.Event()

    def look(_thread: threading.Thread) -> float:
        if (number := next(looks)) == 30:  # one every 0.02 s
            enough.set()
        return float(number)

    monkeypatch.setattr(timeouts, "_thread_cpu_seconds", look)
    began = time.monotonic()
    assert call_with_timeout(0.2, lambda: enough.wait(60), extend_while_busy=True)
    assert time.monotonic() - began > 0.2


def test_the_time_of_a_thread_grows_while_it_works() -> None:
    over, deadline = threading.Event(), time.monotonic() + 60
    thread = threading.Thread(target=lambda: all(iter(lambda: not over.is_set(), False)))
    thread.start()
    first = timeouts._thread_cpu_seconds(thread)
    while timeouts._thread_cpu_seconds(thread) == first:
        assert time.monotonic() < deadline
    over.set()
    thread.join()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ESTALE, StorageUnreachableError), (errno.EIO, StorageUnreachableError), (errno.ENOENT, OSError)],
)
def test_storage_that_says_it_is_away(number: int, kind: type[Exception], tmp_path: Path) -> None:
    def read() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind):
        read_with_timeout(tmp_path, 60, read)
