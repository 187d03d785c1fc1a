"""A worker process of the loader: it takes jobs until its pipe ends, and writes rows into the trainer's memory."""

import contextlib
import faulthandler
import logging
import os
import pickle
import select
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from foveal.data.batch_plan import BatchPlan
from foveal.data.row_arrays import ReadResult
from foveal.data.sample_reader import ReadMonitor, SampleReader
from foveal.data.slab import SlabMap
from foveal.data.worker_protocol import Job, JobResult, LogMessage, StreamNotice, StreamSpec, WorkerStates
from foveal.errors import FovealError

STACK_SIGNAL = signal.SIGRTMIN  # makes a worker write its stacks; Slurm and users send the others


class SharedDescriptors(NamedTuple):
    """The descriptors that all workers have: the pipe of jobs, the states of all workers, a file for stacks."""

    jobs: int
    states: int
    stacks: int


def run_worker(worker: int, socket_descriptor: int, shared: SharedDescriptors) -> None:
    """Work until the trainer is gone or closes the pipes. Only worker 0 fetches remote shards ahead of their use."""
    torch.set_num_threads(1)
    faulthandler.enable(file=shared.stacks)
    faulthandler.register(STACK_SIGNAL, file=shared.stacks, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACK_SIGNAL])
    os.set_blocking(shared.jobs, False)
    states = WorkerStates(shared.states)
    messages = socket.socket(fileno=socket_descriptor)
    sender = _Sender(Connection(os.dup(socket_descriptor), readable=False))
    sender.take_over_log()
    streams = _Streams(messages, lambda: states.add_progress(worker))
    poll = select.poll()
    poll.register(messages, select.POLLIN)
    poll.register(shared.jobs, select.POLLIN)
    states.set_ready(worker)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if messages.fileno() in ready and not streams.receive_notice():
                return
            if shared.jobs in ready:
                try:
                    data = os.read(shared.jobs, Job.FORM.size)
                except BlockingIOError:  # another worker has taken it
                    continue
                if not data:
                    return
                sender.send(_do_job(Job(*Job.FORM.unpack(data)), streams, states, worker))
    except (BrokenPipeError, ConnectionResetError):
        return  # the trainer is gone


def _do_job(job: Job, streams: "_Streams", states: WorkerStates, worker: int) -> JobResult:
    """Read the rows of a job; those of a stream that has ended are not wanted."""
    stream = streams.find(job.stream)
    if stream is None:
        return JobResult(job.stream, job.number, ReadResult())
    if isinstance(stream, Exception):
        return JobResult(job.stream, job.number, ReadResult(), stream)
    try:
        monitor = _SharedMonitor(states, worker, stream.slab, job.stream)
        if worker == 0:
            stream.plan.prefetch(job.number)
        reader = SampleReader(stream.plan, monitor)
        rows = range(job.first_row, job.stop_row)
        result = reader.read_rows(job.number, rows, stream.slab.arrays(job.slot))
        return JobResult(job.stream, job.number, result)
    except Exception as error:  # noqa: BLE001 - raised again in the trainer, which waits for the rows
        return JobResult(job.stream, job.number, ReadResult(), _make_portable(error))
    finally:
        states.set_sample(worker, "")


def _make_portable(error: Exception) -> Exception:
    """Return an error that pickles; its traceback becomes a note of one that is none of ours."""
    if not isinstance(error, FovealError):
        error.add_note(f"in a process of the loader:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))  # noqa: S301 - of this process
    except Exception:  # noqa: BLE001 - whatever cannot be pickled is told by its text
        return RuntimeError("".join(traceback.format_exception(error)))


class _SharedMonitor(ReadMonitor):
    """Reports the progress of a worker in the memory that the trainer sees."""

    def __init__(self, states: WorkerStates, worker: int, slab: SlabMap, stream: int) -> None:
        self._states, self._worker, self._slab, self._stream = states, worker, slab, stream

    def start_sample(self, description: str) -> None:
        self._states.set_sample(self._worker, description)

    def finish_sample(self) -> None:
        self._states.add_progress(self._worker)

    def is_cancelled(self) -> bool:
        return self._slab.user != self._stream


class _Stream(NamedTuple):
    plan: BatchPlan
    slab: SlabMap


class _Streams:
    """The streams that this worker has been told of, by number."""

    def __init__(self, messages: socket.socket, on_download: Callable[[], None]) -> None:
        self._messages = messages
        self._on_download = on_download
        self._streams: dict[int, _Stream | Exception] = {}

    def find(self, stream: int) -> _Stream | Exception | None:
        """Return a stream, or the error of its begin; None if it has ended.

        Its notice was sent before its jobs, and may be unread.
        """
        while stream not in self._streams and select.select([self._messages], [], [], 0)[0]:
            if not self.receive_notice():
                break
        return self._streams.get(stream)

    def receive_notice(self) -> bool:
        """Receive one notice of the trainer; return whether there was one, and not the end of the pipe."""
        data, descriptors, _, _ = socket.recv_fds(self._messages, StreamNotice.FORM.size, 2, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        notice = StreamNotice(*StreamNotice.FORM.unpack(data))
        if not notice.num_spec_bytes:
            self._streams.pop(notice.stream, None)
            return True
        spec_descriptor, slab_descriptor = descriptors
        try:
            self._streams[notice.stream] = self._begin(
                os.pread(spec_descriptor, notice.num_spec_bytes, 0), slab_descriptor
            )
        except Exception as error:  # noqa: BLE001 - raised again in the trainer, which waits for the first job
            self._streams[notice.stream] = _make_portable(error)
        os.close(spec_descriptor)
        os.close(slab_descriptor)
        return True

    def _begin(self, pickled_spec: bytes, slab_descriptor: int) -> _Stream:
        """Open a stream's data sets and map its slab."""
        spec: StreamSpec = pickle.loads(pickled_spec)  # noqa: S301 - of the trainer
        for dataset in spec.plan.datasets:
            dataset.watch_downloads(self._on_download)
        return _Stream(spec.plan, SlabMap(slab_descriptor, spec.layout, spec.num_slots))


class _Sender:
    """Sends answers and log records to the trainer, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: JobResult | LogMessage) -> None:
        """Send a message. Raises: BrokenPipeError if the trainer is gone."""
        with self._lock:
            self._connection.send(message)

    def take_over_log(self) -> None:
        """Send all log records and warnings of this process to the trainer's log."""
        root = logging.getLogger()
        root.handlers = [_LogSender(self)]
        logging.captureWarnings(True)


class _LogSender(logging.Handler):
    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone
            self._sender.send(LogMessage(record.name, record.levelno, self.format(record)))
