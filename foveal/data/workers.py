"""Threads that prepare batches, and the watch over them: one that hangs is named, and keeps no process from ending."""

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

_POLL_SECONDS = 1.0  # seconds between two looks at jobs that are not done
_JOIN_TIMEOUT = 2.0  # seconds that all threads together have to finish the samples in their hands
_log = logging.getLogger(__name__)

Job = Callable[["Worker"], None]


class Worker:
    """What a thread is doing: the sample in its hands, in words, and how many it has finished."""

    def __init__(self) -> None:
        self.describe_current: Callable[[], str] | None = None
        self.num_finished = 0


class WorkerPool:
    """``threads`` daemon threads that take jobs in order.

    Not a ThreadPoolExecutor: Python waits for the threads of one when it ends, and a thread that hangs in a read of a
    dead file server would keep a rank, its GPU and its node for ever. ``pulse`` grows while bytes arrive from elsewhere.
    """

    def __init__(self, num_threads: int, stall_timeout: float, progress: Callable[[], int]) -> None:
        self.stop_event = threading.Event()
        self._patience, self._pulse = stall_timeout, progress
        self._jobs: queue.SimpleQueue[tuple[Future[None], Job] | None] = queue.SimpleQueue()
        self._workers = [Worker() for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"foveal-decode-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Future[None]:
        """Queue a job; it gets the worker whose thread does it."""
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def wait_for_jobs(self, futures: Iterable[Future[None]]) -> None:
        """Until all jobs are done. Raises: what a job raised; DataError when nothing has moved for ``patience`` seconds."""
        waiting = list(futures)
        moved, since = self._progress_state(), time.monotonic()
        look = min(_POLL_SECONDS, self._patience / 4)
        while waiting:
            done, left = wait_for(waiting, timeout=look, return_when="FIRST_EXCEPTION")
            for job in done:
                job.result()
            waiting = list(left)
            now = self._progress_state()
            if now != moved:
                moved, since = now, time.monotonic()
            elif waiting and time.monotonic() - since > self._patience:
                self.stop_event.set()
                raise StorageUnreachableError(self._stall_message())

    def close(self) -> None:
        """Let the threads go; those that hang are left behind."""
        self.stop_event.set()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + _JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self, worker: Worker) -> None:
        while (taken := self._jobs.get()) is not None:
            future, job = taken
            if self.stop_event.is_set():
                future.cancel()
                continue
            try:
                job(worker)
                future.set_result(None)
            except BaseException as error:  # noqa: BLE001 - whoever waits for the job decides
                future.set_exception(error)
            finally:
                worker.describe_current = None

    def _progress_state(self) -> tuple[int, int]:
        return sum(worker.num_finished for worker in self._workers), self._pulse()

    def _stall_message(self) -> str:
        _log.error("the loader hangs; every thread of this process:\n%s", format_thread_stacks())
        held = [worker.describe_current for worker in self._workers]
        busy = "; ".join(doing() for doing in held if doing is not None) or "no sample"
        return (
            f"no data for {self._patience:g} s (data.patience_seconds), the loader is stuck at {busy}; "
            f"the stacks of all threads are in the log: see whether its storage answers, and start again"
        )


def format_thread_stacks() -> str:
    """The stack of every thread of this process, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()  # noqa: SLF001 - the documented way to other threads' frames
    ]
    return "\n".join(parts)
