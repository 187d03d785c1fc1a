"""The data of an evaluation: this rank's batches of a subset of a split."""

from collections.abc import Generator

from foveal.data.batch import Batch
from foveal.data.loader import eval_batches
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.data.workers import WorkerPool
from foveal.distributed.world import World
from foveal.training.plan import Plan


def open_evaluation_data(
    plan: Plan, world: World, workers: WorkerPool | None, *, split: str, subset: SubsetName
) -> tuple[Generator[Batch, None, None], int]:
    """Return this rank's batches of a subset of a split, and the number of images over all ranks."""
    batches = eval_batches(
        plan.dataset,
        plan.cfg.data,
        split=split,
        subset=subset,
        training_seed=plan.cfg.seed,
        rank=world.rank,
        world_size=world.size,
        microbatch_size=plan.cfg.batch.max_micro_size,
        label_reader=plan.label_reader,
        workers=workers,
    )
    return batches, len(select_subset(plan.dataset, plan.cfg.data, split=split, subset=subset, seed=plan.cfg.seed))
