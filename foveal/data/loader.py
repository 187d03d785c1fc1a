"""Microbatches in the order of a plan: decoded by worker processes ahead of their use, or here when they are due."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from foveal.data.batch import Batch
from foveal.data.batch_plan import BatchPlan, EvaluationBatchPlan, TrainingBatchPlan
from foveal.data.batch_stream import BatchStream
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import LabelReader
from foveal.data.row_arrays import RowLayout, make_batch
from foveal.data.sample_reader import ReadMonitor, SampleReader
from foveal.data.sampling.sources import SampleSource, TrainingSet
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.data.workers import WorkerPool


class Loader:
    """The microbatches of a plan. It has no state to save: a plan from another step on continues.

    workers: processes that decode data.prefetch_batches microbatches ahead; None: the calling thread decodes a
    microbatch when it is due.
    """

    def __init__(self, plan: BatchPlan, workers: WorkerPool | None) -> None:
        self._plan = plan
        self._workers = workers

    def batches(self) -> Generator[Batch, None, None]:
        """Yield the microbatches, from the first. Raises: DataError with shard and sample; as ``WorkerPool``."""
        return self._read_here() if self._workers is None else self._read_ahead(self._workers)

    def _read_here(self) -> Generator[Batch, None, None]:
        plan = self._plan
        layout, reader = RowLayout.from_plan(plan), SampleReader(plan, ReadMonitor())
        for number in range(plan.num_batches):
            plan.prefetch(number)
            tensors = layout.allocate()
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            result = reader.read_rows(number, range(plan.num_rows), arrays)
            yield make_batch(plan, number, tensors, [result])

    def _read_ahead(self, workers: WorkerPool) -> Generator[Batch, None, None]:
        num_ahead, num_batches = self._plan.cfg.prefetch_batches, self._plan.num_batches
        with closing(BatchStream(workers, self._plan, num_ahead)) as stream:
            submitted = 0
            for number in range(num_batches):
                while submitted < min(number + 1 + num_ahead, num_batches):
                    stream.submit(submitted)
                    submitted += 1
                yield stream.take(number)


@contextmanager
def train_batches(
    training_set: TrainingSet,
    cfg: DataConfig,
    *,
    rank: int,
    world_size: int,
    microbatch_size: int,
    start_step: int,
    stop_step: int,
    skipped_batches: Sequence[int] = (),
    label_reader: LabelReader | None = None,
    mean: Sequence[float] = (),
    workers: WorkerPool | None = None,
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over one rank's microbatches for the steps start_step..stop_step-1, from the first of start_step.

    skipped_batches: numbers of the batches that no step consumes, ascending. label_reader: reads ``Batch.targets``, if
    any. mean: of the pixels, per channel, for RandAugment. workers: as in ``Loader``; leaving the context takes back
    what they have not begun.
    Raises: ConfigError if ranks, lanes or microbatch_size do not divide; ``next``: DataError with shard and sample.
    """
    plan = TrainingBatchPlan(
        training_set,
        cfg,
        rank,
        world_size,
        microbatch_size,
        start_step,
        stop_step,
        tuple(skipped_batches),
        label_reader,
        tuple(mean),
    )
    with closing(Loader(plan, workers).batches()) as batches:
        yield batches


def eval_batches(
    dataset: Dataset,
    cfg: DataConfig,
    *,
    split: str,
    subset: SubsetName,
    training_seed: int,
    rank: int,
    world_size: int,
    microbatch_size: int,
    label_reader: LabelReader | None = None,
    workers: WorkerPool | None = None,
) -> Generator[Batch, None, None]:
    """Yield every sample of a subset exactly once over all ranks, in batches of ``microbatch_size`` centre crops.

    All ranks get the same number of batches. Padding rows and samples that do not decode have valid=False, label -1
    and id -1. ``microbatch_index`` counts batches from 0. ``training_seed`` selects the holdout; ``label_reader`` and
    ``workers`` as in ``train_batches``; closing the generator is leaving the context.
    """
    source = SampleSource(dataset, split, select_subset(dataset, cfg, split=split, subset=subset, seed=training_seed))
    plan = EvaluationBatchPlan(source, cfg, rank, world_size, microbatch_size, label_reader)
    return Loader(plan, workers).batches()
