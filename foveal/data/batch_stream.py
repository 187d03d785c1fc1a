"""The microbatches of a plan, in order, from worker processes: their slots, their jobs, and what has been read."""

from dataclasses import dataclass, field

from foveal.data.batch import Batch, release_finished_copies, wait_for_oldest_copy
from foveal.data.batch_plan import BatchPlan
from foveal.data.row_arrays import ReadResult, RowLayout, make_batch
from foveal.data.worker_protocol import Job, JobResult, StreamSpec
from foveal.data.workers import WorkerPool

_ROWS_PER_JOB = 16  # images: a few hundredths of a second


@dataclass
class _Pending:
    """A microbatch that is being read."""

    slot: int
    num_unfinished: int
    results: list[ReadResult] = field(default_factory=list)
    error: Exception | None = None


class BatchStream:
    """Microbatches of a plan that workers read into a slab, ``num_ahead`` of them ahead of their use.

    A batch is a view of its slot, which is used again when nothing holds the batch and no GPU copies from it. There are
    slots for what the plan's consumer holds; one that holds more gets copies.
    """

    def __init__(self, workers: WorkerPool, plan: BatchPlan, num_ahead: int) -> None:
        self._workers, self._plan, self._num_ahead = workers, plan, num_ahead
        layout = RowLayout.from_plan(plan)
        self._slab = workers.take_slab(layout, count_slots(plan, num_ahead))
        spec = StreamSpec(plan, layout, self._slab.num_slots)
        self._stream = workers.begin_stream(spec, self._slab, self._receive)
        self._rows_per_job = max(1, min(_ROWS_PER_JOB, -(-plan.num_rows // workers.num_workers)))
        self._pending: dict[int, _Pending] = {}

    def submit(self, number: int) -> None:
        """Have a microbatch read; at most ``num_ahead`` + 1 may be under way."""
        slot, num_rows = self._slab.take_slot(), self._plan.num_rows
        starts = range(0, num_rows, self._rows_per_job)
        self._pending[number] = _Pending(slot, len(starts))
        self._workers.submit(
            [Job(self._stream, number, slot, start, min(start + self._rows_per_job, num_rows)) for start in starts]
        )

    def take(self, number: int) -> Batch:
        """Wait for a microbatch and return it. Raises: what its reader raised; as ``WorkerPool.wait_until``."""
        pending = self._pending[number]
        self._workers.wait_until(lambda: not pending.num_unfinished or pending.error is not None)
        if pending.error is not None:
            raise pending.error
        del self._pending[number]
        lends = self._leaves_enough_slots()
        tensors = self._slab.lend_slot(pending.slot) if lends else self._slab.copy_slot(pending.slot)
        return make_batch(self._plan, number, tensors, pending.results)

    def close(self) -> None:
        """Take back what the workers have not begun."""
        self._workers.end_stream(self._stream)

    def _leaves_enough_slots(self) -> bool:
        """Return whether the workers can go on ``num_ahead`` microbatches ahead when one more slot is lent."""
        release_finished_copies()
        while self._slab.num_free + len(self._pending) <= self._num_ahead:
            if not wait_for_oldest_copy():
                return False
        return True

    def _receive(self, message: JobResult) -> None:
        pending = self._pending[message.number]
        pending.num_unfinished -= 1
        pending.results.append(message.result)
        pending.error = pending.error or message.error


def count_slots(plan: BatchPlan, num_ahead: int) -> int:
    """Return the slots of a stream: of microbatches ahead, of those that its consumer holds, and two in between."""
    return num_ahead + 2 + plan.num_held
