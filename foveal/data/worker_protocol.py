"""What the trainer and its worker processes share: the form of jobs and messages, and a page of state for each worker."""

import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np

from foveal.data.batch_plan import BatchPlan
from foveal.data.memory_file import allocate_memory_file
from foveal.data.row_arrays import ReadResult, RowLayout

_PAGE = mmap.PAGESIZE
_TEXT_START = 64  # bytes; before them are numbers


@dataclass(frozen=True)
class Job:
    """Rows [first_row, stop_row) of a microbatch of a stream, to be written into a slot of its slab.

    All workers read jobs of this size from one pipe, so that whichever has time takes the next.
    """

    stream: int
    number: int
    slot: int
    first_row: int
    stop_row: int

    FORM = struct.Struct("5q")

    def to_bytes(self) -> bytes:
        return self.FORM.pack(self.stream, self.number, self.slot, self.first_row, self.stop_row)


@dataclass(frozen=True)
class StreamSpec:
    """What a worker needs for the jobs of a stream, beside the descriptor of its slab."""

    plan: BatchPlan
    layout: RowLayout
    num_slots: int


@dataclass(frozen=True)
class StreamNotice:
    """A message to a worker: a stream begins (with descriptors of its pickled spec and of its slab), or ends."""

    stream: int
    num_spec_bytes: int  # 0: it ends

    FORM = struct.Struct("2q")

    def to_bytes(self) -> bytes:
        return self.FORM.pack(self.stream, self.num_spec_bytes)


@dataclass(frozen=True)
class JobResult:
    """A worker's answer to a job."""

    stream: int
    number: int
    result: ReadResult
    error: Exception | None = None


@dataclass(frozen=True)
class LogMessage:
    """A record of a worker's log, for the log of its rank."""

    logger: str
    level: int
    text: str


class WorkerStates:
    """A page of shared memory for each worker: its process id, how far it is, and the sample that it reads."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers = np.ndarray((len(self._memory) // _PAGE, _PAGE // 8), np.int64, self._memory)

    @staticmethod
    def create(num_workers: int) -> int:
        """Return the descriptor of new memory for so many workers."""
        return allocate_memory_file(
            "foveal-workers", num_workers * _PAGE, "the states of workers", "lower data.workers"
        )

    def set_ready(self, worker: int) -> None:
        """State that this process is a worker and waits for jobs."""
        self._numbers[worker, 0] = os.getpid()

    def add_progress(self, worker: int) -> None:
        """Count a sample, or bytes that have arrived."""
        self._numbers[worker, 1] += 1

    def set_sample(self, worker: int, description: str) -> None:
        """State which sample a worker reads; empty: none."""
        text = description.encode()[: _PAGE - _TEXT_START]
        start = worker * _PAGE + _TEXT_START
        self._memory[start : start + len(text)] = text
        self._numbers[worker, 2] = len(text)

    def process_id(self, worker: int) -> int:
        """Return a worker's process id; 0 before it is ready."""
        return int(self._numbers[worker, 0])

    def progress(self) -> int:
        """Return a number that grows while any worker moves."""
        return int(self._numbers[:, :2].sum())

    def sample(self, worker: int) -> str:
        """Return the sample that a worker reads; empty: none."""
        start = worker * _PAGE + _TEXT_START
        return self._memory[start : start + int(self._numbers[worker, 2])].decode(errors="replace")
