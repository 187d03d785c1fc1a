"""Worker threads of the loader. A stall names the samples in work, and a hanging thread does not block process exit."""

import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

from foveal.errors import StorageUnreachableError

_POLL_SECONDS = 1.0  # seconds between two checks of unfinished jobs
_JOIN_TIMEOUT = 2.0  # seconds for all threads together to finish their current samples
_log = logging.getLogger(__name__)

Job = Callable[["WorkerState"], None]


class WorkerState:
    """State of a worker thread: a description of its current sample, and the number of finished samples."""

    def __init__(self) -> None:
        self.describe_current_sample: Callable[[], str] | None = None
        self.num_finished_samples = 0


class WorkerPool:
    """``num_threads`` daemon threads that take jobs in order.

    Not a ThreadPoolExecutor: Python joins an executor's threads at exit, and a thread that hangs in a read from a dead
    file server would keep a rank, its GPU and its node for ever. ``progress`` returns a number that grows while bytes
    arrive from remote storage; ``stall_timeout`` is in seconds.
    """

    def __init__(self, num_threads: int, stall_timeout: float, download_counter: Callable[[], int]) -> None:
        self.stop_event = threading.Event()
        self._stall_timeout, self._progress = stall_timeout, download_counter
        self._jobs: queue.SimpleQueue[tuple[Future[None], Job] | None] = queue.SimpleQueue()
        self._workers = [WorkerState() for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"foveal-decode-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Future[None]:
        """Queue a job, which is called with the worker of its thread."""
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def wait_for_jobs(self, futures: Iterable[Future[None]]) -> None:
        """Wait until all jobs are done.

        Raises: a job's exception; StorageUnreachableError after ``stall_timeout`` seconds without progress.
        """
        pending = list(futures)
        state, last_change = self._progress_state(), time.monotonic()
        poll_seconds = min(_POLL_SECONDS, self._stall_timeout / 4)
        while pending:
            finished, unfinished = wait_for(pending, timeout=poll_seconds, return_when="FIRST_EXCEPTION")
            for future in finished:
                future.result()
            pending = list(unfinished)
            new_state = self._progress_state()
            if new_state != state:
                state, last_change = new_state, time.monotonic()
            elif pending and time.monotonic() - last_change > self._stall_timeout:
                self.stop_event.set()
                raise StorageUnreachableError(self._stall_message())

    def close(self) -> None:
        """Stop the threads; a thread that hangs is abandoned."""
        self.stop_event.set()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, worker: WorkerState) -> None:
        while (queued := self._jobs.get()) is not None:
            future, job = queued
            if self.stop_event.is_set():
                future.cancel()
                continue
            try:
                job(worker)
                future.set_result(None)
            except BaseException as error:  # noqa: BLE001 - the thread that waits for the job handles it
                future.set_exception(error)
            finally:
                worker.describe_current_sample = None

    def _progress_state(self) -> tuple[int, int]:
        return sum(worker.num_finished_samples for worker in self._workers), self._progress()

    def _stall_message(self) -> str:
        _log.error("the loader hangs; every thread of this process:\n%s", format_thread_stacks())
        describers = [worker.describe_current_sample for worker in self._workers]
        samples = "; ".join(describe() for describe in describers if describe is not None) or "no sample"
        return (
            f"no data for {self._stall_timeout:g} s (data.stall_timeout_seconds), the loader is stuck at {samples}; "
            f"the stacks of all threads are in the log: check that the storage answers, and start again"
        )


def format_thread_stacks() -> str:
    """Return the stack of every thread of this process as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()  # noqa: SLF001 - documented access to other threads' frames
    ]
    return "\n".join(parts)
