"""Worker threads of the loader: errors, stalls, shutdown."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from foveal.data.workers import WorkerPool, WorkerState
from foveal.errors import DataError


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event that a hanging job waits for; set at the end, so that the job does not outlive its test."""
    event = threading.Event()
    yield event
    event.set()


def make_pool(threads: int = 2, stall_timeout: float = 0.2) -> WorkerPool:
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
    def hang_in_a_read(worker: WorkerState) -> None:
        worker.describe_current_sample = lambda: "s3://bucket/train-000007.tar: sample 'n01440764_36'"
        release.wait(30)

    pool = make_pool()
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no data for 0.2 s .* stuck at s3://bucket/train-000007.tar: sample 'n01440"):
        pool.wait_for_jobs([pool.submit(hang_in_a_read)])
    assert time.monotonic() - start < 20
    assert "hang_in_a_read" in caplog.text
    assert "MainThread" in caplog.text
    pool.close()
    assert time.monotonic() - start < 25, "closing waits for a thread that hangs"


def test_closing_takes_no_longer_with_many_threads_that_hang(release: threading.Event) -> None:
    pool, begun = make_pool(threads=8), threading.Barrier(9)

    def hang(_worker: WorkerState) -> None:
        begun.wait(10)
        release.wait(30)

    for _ in range(8):
        pool.submit(hang)
    begun.wait(10)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 20


def test_what_moves_does_not_hang(release: threading.Event) -> None:
    """Longer than the stall timeout in total, with progress: samples finish in one case, bytes arrive in the other."""

    def slow(worker: WorkerState) -> None:
        for _ in range(8):
            time.sleep(0.1)
            worker.num_finished_samples += 1

    pool = make_pool()
    pool.wait_for_jobs([pool.submit(slow)])
    pool.close()
    bytes_arrived = iter(range(10**6))
    downloading = WorkerPool(1, 0.2, lambda: next(bytes_arrived))
    downloading.wait_for_jobs([downloading.submit(lambda _worker: time.sleep(0.8))])
    downloading.close()


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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "ended\n"
