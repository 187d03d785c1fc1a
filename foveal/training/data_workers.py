"""The worker processes that read a run's data: how many, and their life, which is that of the outermost run."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from foveal.cgroups import read_cpu_limit
from foveal.data.batch_plan import TrainingBatchPlan
from foveal.data.row_arrays import RowLayout
from foveal.data.sample_reader import ReadMonitor, SampleReader
from foveal.data.workers import WorkerPool
from foveal.distributed.world import World
from foveal.errors import FovealError
from foveal.timeouts import read_with_timeout
from foveal.training.plan import Plan
from foveal.training.run import Run

_TINY_SECONDS = 5.0  # of one core for an epoch: less than what processes save
_MEASURED_ROWS = 16
MAX_AUTO_WORKERS = 16  # that data.workers=auto takes
_log = logging.getLogger(__name__)


@contextmanager
def open_workers(plan: Plan, world: World, outer_run: Run | None) -> Iterator[WorkerPool | None]:
    """Start the processes that data.workers asks for, and end them on every way out; None: this process reads itself.

    They import while the model is built. A run within ``outer_run`` has those of that run. A collective. Nothing that is
    read depends on their number.
    """
    if outer_run is not None:
        yield outer_run.workers
        return
    num_cores = _count_own_cores(world)
    num_workers = plan.cfg.data.workers
    if num_workers == "auto":
        epoch_seconds = _measure_epoch_seconds(plan, world)
        num_workers = choose_num_workers(num_cores, epoch_seconds)
        read = "" if epoch_seconds is None else f", one of which reads an epoch's images in {epoch_seconds:.3g} s"
        _log.info("data.workers=auto: %d; cores of this rank: %d%s", num_workers, num_cores, read)
    if not num_workers:
        yield None
        return
    modules = ("torchvision.transforms.v2",) if plan.cfg.data.augment.rand_augment.ops else ()
    with closing(WorkerPool(num_workers, plan.cfg.data.stall_timeout_seconds, modules)) as workers:
        yield workers


def plan_first_step(plan: Plan, rank: int) -> TrainingBatchPlan:
    """Return the microbatches of a rank in the first step."""
    return TrainingBatchPlan(
        plan.training_set,
        plan.cfg.data,
        rank,
        plan.world_size,
        plan.microbatch_size,
        start_step=0,
        stop_step=1,
        label_reader=plan.label_reader,
        mean=plan.mean,
    )


def _count_own_cores(world: World) -> int:
    """Return the cores that this process has to itself, if those that it shares with other ranks are dealt out.

    The quota of a container is shared by its ranks, which may all run on all cores of the host.
    """
    own = (socket.gethostname(), os.sched_getaffinity(0), read_cpu_limit())
    neighbours = [rank for rank in world.all_gather_objects(own) if rank[0] == own[0]]
    num_cores = len(own[1]) // sum(bool(cores & own[1]) for _, cores, _ in neighbours)
    if own[2] is not None:
        num_cores = min(num_cores, int(own[2] / sum(limit == own[2] for _, _, limit in neighbours)))
    return max(1, num_cores)


def choose_num_workers(num_cores: int, epoch_seconds: float | None) -> int:
    """Return how many workers data.workers=auto means: one for each core but one; 0 if one core reads an epoch soon.

    num_cores: of the rank. epoch_seconds: in which one of them reads the rank's samples of an epoch; None: unknown.
    """
    is_tiny = epoch_seconds is not None and epoch_seconds < _TINY_SECONDS
    return 0 if is_tiny else max(1, min(num_cores - 1, MAX_AUTO_WORKERS))


def _measure_epoch_seconds(plan: Plan, world: World) -> float | None:
    """Return the seconds in which a core reads this rank's samples of an epoch; None if it has to wait for a network."""
    if any(source.dataset.is_remote for source in plan.training_set.sources):
        return None
    seconds = _measure_seconds_per_image(plan, world.rank)
    return None if seconds is None else seconds * plan.steps_per_epoch * plan.cfg.batch.global_size / world.size


def _measure_seconds_per_image(plan: Plan, rank: int) -> float | None:
    """Return the processor's seconds for one image, from a few of the first microbatch; None if they cannot be read."""
    batches = plan_first_step(plan, rank)
    reader = SampleReader(batches, ReadMonitor())
    arrays = {name: tensor.numpy() for name, tensor in RowLayout.from_plan(batches).allocate().items()}

    def measure() -> float:
        rows = range(min(_MEASURED_ROWS, plan.microbatch_size))
        reader.read_rows(0, rows, arrays)  # opens the indices of these samples, which is no cost of an image
        start = time.thread_time()
        reader.read_rows(0, rows, arrays)
        return (time.thread_time() - start) / len(rows)

    try:
        return read_with_timeout(plan.dataset.folder, plan.cfg.data.stall_timeout_seconds, measure)
    except FovealError:
        return None  # the loader meets it again, and says it on every rank
