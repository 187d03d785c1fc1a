"""Worker threads of the loader: errors, stalls, shutdown."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from foveal.data import workers
from foveal.data.workers import WorkerPool, WorkerState
from foveal.errors import DataError

WAIT = 60  # seconds until a thread runs on a busy machine


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event that a hanging job waits for; set at the end, so that the job does not outlive its test."""
    event = threading.Event()
    yield event
    event.set()


def make_pool(threads: int = 2, stall_timeout: float = 60.0) -> WorkerPool:
    return WorkerPool(threads, stall_timeout, lambda: 0)


def test_jobs_are_done_and_their_mistakes_reach_who_waits() -> None:
    finished: list[int] = []
    pool = make_pool()
    pool.wait_for_jobs([pool.submit(lambda _worker, number=number: finished.append(number)) for number in range(20)])
    assert sorted(finished) == list(range(20))

    def fail(_worker: WorkerState) -> None:
        raise DataError("a shard is gone")

    with pytest.raises(DataError, match="a shard is gone"):
        pool.wait_for_jobs([pool.submit(fail)])
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("foveal-decode")]


def test_a_thread_that_hangs_is_named_with_its_sample_and_its_stack(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    def hang_in_a_read(worker: WorkerState) -> None:
        worker.describe_current_sample = lambda: "s3://bucket/train-000007.tar: sample 'n01440764_36'"
        begun.set()
        release.wait()

    pool = make_pool(stall_timeout=0.2)
    job = pool.submit(hang_in_a_read)
    assert begun.wait(WAIT)
    with pytest.raises(DataError, match=r"no data for 0.2 s .* stuck at s3://bucket/train-000007.tar: sample 'n01440"):
        pool.wait_for_jobs([job])
    assert "hang_in_a_read" in caplog.text
    assert "MainThread" in caplog.text
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 8 * workers._JOIN_TIMEOUT, "closing waits for a thread that hangs"


def test_closing_takes_no_longer_with_many_threads_that_hang(release: threading.Event) -> None:
    pool, begun = make_pool(threads=8), threading.Barrier(9)

    def hang(_worker: WorkerState) -> None:
        begun.wait(WAIT)
        release.wait()

    for _ in range(8):
        pool.submit(hang)
    begun.wait(WAIT)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 8 * workers._JOIN_TIMEOUT


@pytest.mark.parametrize("what", ["samples", "bytes"])
def test_what_moves_does_not_hang(what: str) -> None:
    """Longer than the stall timeout in total, and at every look a sample is finished, or bytes have arrived."""
    looks, begun, enough = itertools.count(1), threading.Event(), threading.Event()
    states: list[WorkerState] = []

    def look() -> int:
        if (number := next(looks)) == 10:  # one every 0.05 s
            enough.set()
        for state in states if what == "samples" else ():
            state.num_finished_samples += 1
        return number if what == "bytes" else 0

    def slow(worker: WorkerState) -> None:
        states.append(worker)
        begun.set()
        assert enough.wait(WAIT)

    pool = WorkerPool(1, 0.2, look)
    job = pool.submit(slow)
    assert begun.wait(WAIT)
    start = time.monotonic()
    pool.wait_for_jobs([job])
    assert time.monotonic() - start > 0.2
    pool.close()


def test_a_thread_that_hangs_keeps_no_process_from_ending() -> None:
    code = """
import threading
from foveal.data.workers import WorkerPool
from foveal.errors import DataError
pool = WorkerPool(1, 0.1, lambda: 0)
try:
    pool.wait_for_jobs([pool.submit(lambda worker: threading.Event().wait())])
except DataError:
    pool.close()
    print("ended")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert process.stdout == "ended\n"
