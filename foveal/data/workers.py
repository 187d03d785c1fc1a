"""The worker processes of a run, as the trainer sees them: their start, their jobs, their messages, and their end."""

import logging
import os
import pickle
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

from foveal.data.memory_file import create_memory_file
from foveal.data.row_arrays import RowLayout
from foveal.data.server_process import ServerProcess
from foveal.data.slab import Slab
from foveal.data.worker_process import STACK_SIGNAL, SharedDescriptors
from foveal.data.worker_protocol import Job, JobResult, LogMessage, StreamNotice, StreamSpec, WorkerStates
from foveal.errors import FovealError, StorageUnreachableError, WorkerLostError

_POLL_SECONDS = 1.0  # seconds between two checks of unfinished jobs
_START_SECONDS = 300.0  # for the imports of the server, from a file system that may be slow
_STACK_SECONDS = 1.0  # for workers that hang to write their stacks
_PIPE_BYTES = 1 << 20  # of jobs: tens of thousands
_ATOMIC_JOBS = 4096 // Job.FORM.size  # written at once, PIPE_BUF bytes arrive in one piece
_MAX_IDLE_SLABS = 4
_log = logging.getLogger(__name__)


@dataclass
class _Stream:
    """Microbatches under way: the slab they are written into, and who waits for them (None: nobody any more)."""

    slab: Slab
    on_result: Callable[[JobResult], None] | None


class WorkerPool:
    """Worker processes that read the microbatches of any number of streams, one after the other or interleaved.

    They outlive the streams: a stream is a training loop from a step on, or an evaluation. The constructor returns at
    once; the first wait lasts until the server has imported torch. ``stall_timeout``: seconds. ``modules``: imported
    once for all workers, beside what every run needs.
    """

    def __init__(self, num_workers: int, stall_timeout: float, modules: Sequence[str] = ()) -> None:
        self.num_workers = num_workers
        self._stall_timeout = stall_timeout
        self._streams: dict[int, _Stream] = {}
        self._num_streams = 0
        self._idle_slabs: list[Slab] = []
        self._known_warnings: set[str] = set()
        states = WorkerStates.create(num_workers)
        self._states = WorkerStates(states)
        self._stacks = create_memory_file("foveal-stacks")
        jobs, self._jobs = os.pipe()
        os.set_blocking(self._jobs, False)
        _enlarge_pipe(self._jobs)
        pairs = [socket.socketpair() for _ in range(num_workers)]
        self._sockets = [own for own, _ in pairs]
        self._connections = [Connection(os.dup(own.fileno()), writable=False) for own in self._sockets]
        self._selector = selectors.DefaultSelector()
        for number, connection in enumerate(self._connections):
            self._selector.register(connection, selectors.EVENT_READ, number)
        descriptors = SharedDescriptors(jobs, states, self._stacks)
        self._server = ServerProcess([other.fileno() for _, other in pairs], descriptors, modules)
        for _, other in pairs:
            other.close()
        os.close(jobs)
        os.close(states)

    def take_slab(self, layout: RowLayout, num_slots: int) -> Slab:
        """Return a slab of this layout that nothing uses, one of an earlier stream if there is one."""
        for slab in self._idle_slabs:
            if (slab.layout, slab.num_slots, slab.num_free) == (layout, num_slots, num_slots):
                self._idle_slabs.remove(slab)
                return slab
        return Slab(layout, num_slots)

    def begin_stream(self, spec: StreamSpec, slab: Slab, on_result: Callable[[JobResult], None]) -> int:
        """Tell the workers of a stream and return its number; ``on_result`` is called while the pool waits."""
        self._num_streams += 1
        stream = slab.map.user = self._num_streams
        self._streams[stream] = _Stream(slab, on_result)
        data = pickle.dumps(spec)
        descriptor = create_memory_file("foveal-plan")
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor has no path
            file.write(data)
            file.flush()
            self._notify(StreamNotice(stream, len(data)), [descriptor, slab.descriptor])
        return stream

    def end_stream(self, stream: int) -> None:
        """End a stream. Its slab serves another one when the workers have left their last jobs on it."""
        ended = self._streams.get(stream)
        if ended is None:  # the pool was closed before
            return
        ended.on_result, ended.slab.map.user = None, 0
        self._notify(StreamNotice(stream, 0), [])
        self._keep_slab_if_unused(stream)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, which are begun in this order. Raises: as ``wait_until``, if the queue is full."""
        for job in jobs:
            self._streams[job.stream].slab.num_unfinished += 1
        for start in range(0, len(jobs), _ATOMIC_JOBS):
            data = b"".join(job.to_bytes() for job in jobs[start : start + _ATOMIC_JOBS])
            # Messages are taken while the pipe is full: the workers may wait for that before they read another job.
            self.wait_until(partial(self._write_jobs, data))

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Take the workers' messages until ``is_done``.

        Raises: StorageUnreachableError after ``stall_timeout`` seconds without progress of any worker, WorkerLostError
        if one has ended; both with shard and sample.
        """
        progress, idle_seconds = self._states.progress(), 0.0
        poll_seconds = min(_POLL_SECONDS, self._stall_timeout / 4)
        while not is_done():
            start = time.monotonic()
            for key, _ in self._selector.select(poll_seconds):
                self._receive(key.data)
            new_progress = self._states.progress()
            if new_progress != progress:
                progress, idle_seconds = new_progress, 0.0
                continue
            # A job that was suspended, or a machine that slept, has been idle for one poll and not for all that time.
            idle_seconds += min(time.monotonic() - start, poll_seconds)
            if idle_seconds > self._allowed_seconds():
                raise self._stall_error()

    def process_id(self, worker: int) -> int:
        """Return the process id of a worker; 0 before it is ready."""
        return self._states.process_id(worker)

    def close(self) -> None:
        """Kill the workers, whatever they do, and free their memory."""
        self._selector.close()
        for closing in (*self._sockets, *self._connections):
            closing.close()
        os.close(self._jobs)
        os.close(self._stacks)
        self._server.close()
        slabs = [*self._idle_slabs, *(stream.slab for stream in self._streams.values())]
        self._streams.clear()
        self._idle_slabs.clear()
        for slab in slabs:
            slab.close()

    def _notify(self, notice: StreamNotice, descriptors: list[int]) -> None:
        for worker in self._sockets:
            try:
                socket.send_fds(worker, [notice.to_bytes()], descriptors)
            except (BrokenPipeError, ConnectionResetError):  # the next wait reports it
                continue

    def _write_jobs(self, data: bytes) -> bool:
        """Write jobs into the pipe, all of them or none; return whether that is done."""
        try:
            os.write(self._jobs, data)
        except BlockingIOError:
            return False
        except BrokenPipeError:  # no worker is left, which the next wait reports
            return True
        return True

    def _receive(self, worker: int) -> None:
        """Take one message of a worker."""
        try:
            message: JobResult | LogMessage = self._connections[worker].recv()
        except (EOFError, OSError):  # it ended before a message, or within one
            raise self._loss_error(worker) from None
        if isinstance(message, LogMessage):
            self._log_once(message)
            return
        stream = self._streams[message.stream]
        stream.slab.num_unfinished -= 1
        if stream.on_result is not None:
            stream.on_result(message)
        else:
            self._keep_slab_if_unused(message.stream)

    def _keep_slab_if_unused(self, stream: int) -> None:
        """Keep the slab of a stream that has ended for another one, if no worker may still write into it."""
        slab = self._streams[stream].slab
        if slab.num_unfinished:
            return
        del self._streams[stream]
        slab.free_reserved_slots()
        self._idle_slabs.append(slab)
        if len(self._idle_slabs) > _MAX_IDLE_SLABS:
            self._idle_slabs.pop(0).close()

    def _log_once(self, message: LogMessage) -> None:
        """Log a worker's record; a warning of Python's, which every worker gives once, once."""
        if message.logger == "py.warnings":
            if message.text in self._known_warnings:
                return
            self._known_warnings.add(message.text)
        logging.getLogger(message.logger).log(message.level, "%s", message.text)

    def _allowed_seconds(self) -> float:
        """Return the seconds that may pass without progress; more before the workers have begun."""
        is_ready = all(self._states.process_id(worker) for worker in range(self.num_workers))
        return self._stall_timeout if is_ready else max(self._stall_timeout, _START_SECONDS)

    def _stall_error(self) -> FovealError:
        """Return the error of workers that make no progress, after logging their stacks."""
        _log.error("the loader hangs; the stacks of its workers:\n%s", self._read_stacks())
        samples = [self._states.sample(worker) for worker in range(self.num_workers)]
        stuck_at = "; ".join(sample for sample in samples if sample) or "no sample"
        return StorageUnreachableError(
            f"no data for {self._stall_timeout:g} s (data.stall_timeout_seconds), the loader is stuck at {stuck_at}; the "
            f"stacks of its workers are in the log: check that the storage answers, and start again"
        )

    def _read_stacks(self) -> str:
        for worker in range(self.num_workers):
            if process_id := self._states.process_id(worker):
                os.kill(process_id, STACK_SIGNAL)  # a worker that has ended is not reaped before the pool is closed
        time.sleep(_STACK_SECONDS)
        return self._read_written_stacks()

    def _read_written_stacks(self) -> str:
        return os.pread(self._stacks, os.fstat(self._stacks).st_size, 0).decode(errors="replace")

    def _loss_error(self, worker: int) -> FovealError:
        """Return the error of a worker that has ended, after logging the stack that a crash has left."""
        process_id, sample = self._states.process_id(worker), self._states.sample(worker)
        end = self._server.describe_end(worker)
        if stacks := self._read_written_stacks():
            _log.error("a process of the loader %s; its stack:\n%s", end, stacks)
        if not process_id:
            return WorkerLostError(f"worker {worker} of the loader {end}: what it says of it is on stderr, above")
        doing = f"reading {sample}" if sample else "waiting for work"
        return WorkerLostError(
            f"a process of the loader (worker {worker}, pid {process_id}) {end} while it was {doing}: if it was killed "
            f"for memory, lower data.workers or data.prefetch_batches; start again"
        )


def _enlarge_pipe(descriptor: int) -> None:
    import fcntl

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except PermissionError:  # a user's pipes may have little in all
        return
