"""The threads that prepare batches, and the watch over them."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from foveal.data.workers import Worker, WorkerPool
from foveal.errors import DataError


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What a hanging job waits for: it must not outlive its test."""
    event = threading.Event()
    yield event
    event.set()


def crew(threads: int = 2, patience: float = 0.2) -> WorkerPool:
    return WorkerPool(threads, patience, lambda: 0)


def test_jobs_are_done_and_their_mistakes_reach_who_waits() -> None:
    done: list[int] = []
    workers = crew()
    workers.wait_for_jobs([workers.submit(lambda _worker, number=number: done.append(number)) for number in range(20)])
    assert sorted(done) == list(range(20))

    def fail(_worker: Worker) -> None:
        raise DataError("a shard is gone")

    with pytest.raises(DataError, match="a shard is gone"):
        workers.wait_for_jobs([workers.submit(fail)])
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("foveal-decode")]


def test_a_thread_that_hangs_is_named_with_its_sample_and_its_stack(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def hang_in_a_read(worker: Worker) -> None:
        worker.describe_current = lambda: "s3://bucket/train-000007.tar: sample 'n01440764_36'"
        release.wait(30)

    workers = crew()
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no data for 0.2 s .* stuck at s3://bucket/train-000007.tar: sample 'n01440"):
        workers.wait_for_jobs([workers.submit(hang_in_a_read)])
    assert time.monotonic() - start < 20
    assert "hang_in_a_read" in caplog.text
    assert "MainThread" in caplog.text
    workers.close()
    assert time.monotonic() - start < 25, "closing waits for a thread that hangs"


def test_closing_takes_no_longer_with_many_threads_that_hang(release: threading.Event) -> None:
    workers, begun = crew(threads=8), threading.Barrier(9)

    def hang(_worker: Worker) -> None:
        begun.wait(10)
        release.wait(30)

    for _ in range(8):
        workers.submit(hang)
    begun.wait(10)
    start = time.monotonic()
    workers.close()
    assert time.monotonic() - start < 20


def test_what_moves_does_not_hang(release: threading.Event) -> None:
    """Slower than the patience in all, but never still: samples finish in one case, bytes arrive in the other."""

    def slow(worker: Worker) -> None:
        for _ in range(8):
            time.sleep(0.1)
            worker.num_finished += 1

    workers = crew()
    workers.wait_for_jobs([workers.submit(slow)])
    workers.close()
    bytes_arrived = iter(range(10**6))
    downloading = WorkerPool(1, 0.2, lambda: next(bytes_arrived))
    downloading.wait_for_jobs([downloading.submit(lambda _worker: time.sleep(0.8))])
    downloading.close()


def test_a_thread_that_hangs_keeps_no_process_from_ending() -> None:
    code = """
import threading
from foveal.data.workers import Crew
from foveal.errors import DataError
crew = Crew(1, 0.1, lambda: 0)
try:
    crew.wait([crew.submit(lambda worker: threading.Event().wait())])
except DataError:
    crew.close()
    print("ended")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"
