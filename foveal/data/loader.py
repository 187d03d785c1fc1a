"""Batches from the sample order: a plan of microbatches, and threads that decode ahead. It has no state to save."""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager

import numpy as np

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import CropFunction
from foveal.data.image.randaugment import UNIFORMS_PER_OP, rand_augment
from foveal.data.image.targets import LabelReader
from foveal.data.image.transforms import UNIFORMS_PER_CROP, compute_eval_crop, compute_train_crop
from foveal.data.microbatch import FillRowsJob, MicrobatchPlan, PendingBatch
from foveal.data.sampling.order import batch_index_for_step, microbatches_per_step, rank_slot_range
from foveal.data.sampling.sources import SampleLocation, SampleSource, TrainingSet
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.data.workers import WorkerPool
from foveal.seeding import derive_key, draw_uniform_numpy

_ROWS_PER_JOB = 16  # images per decoding job: a few hundredths of a second


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
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over one rank's microbatches for the steps start_step..stop_step-1, from the first of start_step.

    skipped_batches: numbers of the batches that no step consumes, ascending. label_reader: reads ``Batch.targets``, if
    any. mean: of the pixels, per channel, for RandAugment. Leaving the context stops the threads.
    Raises: ConfigError if ranks, lanes or microbatch_size do not divide; ``next``: DataError with shard and sample.
    """
    order = training_set.order
    first_slot, stop_slot = rank_slot_range(order.batch_size, order.num_lanes, rank, world_size)
    num_microbatches = microbatches_per_step(order.batch_size, world_size, microbatch_size)
    assert stop_slot - first_slot == num_microbatches * microbatch_size
    augment_key = derive_key(training_set.seed, "augment")
    augment_image = _make_rand_augment(cfg, derive_key(training_set.seed, "randaugment"), mean)

    def locate_sample(sample_key: int) -> SampleLocation:
        return training_set.locate_sample(sample_key % training_set.num_ids)

    def plan_microbatches() -> Iterator[MicrobatchPlan]:
        for step in range(start_step, stop_step):
            batch_index = batch_index_for_step(step, skipped_batches)
            training_set.prefetch_shards(batch_index, first_slot, stop_slot)
            slots = order.assign_slots(batch_index, first_slot, stop_slot)
            sample_keys = training_set.sample_keys(slots)
            for microbatch_index in range(num_microbatches):
                rows = slice(microbatch_index * microbatch_size, (microbatch_index + 1) * microbatch_size)
                origins = (slots.source_numbers, slots.stream_positions, slots.source_epochs)
                columns = [values[rows] for values in origins]

                def replacements(row: int, columns: list[np.ndarray] = columns) -> Iterator[int]:
                    return training_set.replacement_keys(*(int(values[row]) for values in columns))

                yield MicrobatchPlan(
                    sample_keys=sample_keys[rows],
                    num_ids=training_set.num_ids,
                    num_rows=microbatch_size,
                    step=step,
                    epoch=order.epoch_of_batch(batch_index),
                    microbatch_index=microbatch_index,
                    locate_by_key=locate_sample,
                    crop_of=_make_train_crops(cfg, augment_key, sample_keys[rows]),
                    replacement_keys=replacements,
                    output_hw=cfg.image_hw,
                    label_reader=label_reader,
                    augment_image=augment_image,
                )

    with closing(_prefetch_batches(cfg, training_set.download_counter, plan_microbatches())) as batches:
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
) -> Generator[Batch, None, None]:
    """Yield every sample of a subset exactly once over all ranks, in batches of ``microbatch_size`` centre crops.

    All ranks get the same number of batches. Padding rows and samples that do not decode have valid=False, label -1
    and id -1. ``microbatch_index`` counts batches from 0. Closing the generator stops its threads.
    ``training_seed`` selects the holdout; ``label_reader`` as in ``train_batches``.
    """
    source = SampleSource(dataset, split, select_subset(dataset, cfg, split=split, subset=subset, seed=training_seed))
    num_batches = -(-len(source.subset) // (world_size * microbatch_size))

    def crop_of(_row: int, _sample_key: int) -> CropFunction:
        return lambda width, height: (compute_eval_crop(width, height, cfg.eval_crop_ratio, cfg.eval_image_hw), False)

    def plan_microbatches() -> Iterator[MicrobatchPlan]:
        for microbatch_index in range(num_batches):
            start = (microbatch_index * world_size + rank) * microbatch_size
            stop = max(start, min(start + microbatch_size, len(source.subset)))
            yield MicrobatchPlan(
                sample_keys=source.subset.to_split_positions(np.arange(start, stop, dtype=np.int64)),
                num_ids=source.stop_id,
                num_rows=microbatch_size,
                step=0,
                epoch=0,
                microbatch_index=microbatch_index,
                locate_by_key=source.locate_sample,
                crop_of=crop_of,
                replacement_keys=None,
                output_hw=cfg.eval_image_hw,
                label_reader=label_reader,
            )

    return _prefetch_batches(cfg, dataset.download_counter, plan_microbatches())


def _make_train_crops(cfg: DataConfig, key: int, sample_keys: np.ndarray) -> Callable[[int, int], CropFunction]:
    """Return the crop of (row, sample key). One call hashes the microbatch; a replacement's key is hashed on demand."""
    microbatch_uniforms = draw_uniform_numpy(key, sample_keys, UNIFORMS_PER_CROP)

    def crop_of(row: int, sample_key: int) -> CropFunction:
        if sample_key == sample_keys[row]:
            uniforms = microbatch_uniforms[row]
        else:
            uniforms = draw_uniform_numpy(key, np.array([sample_key]), UNIFORMS_PER_CROP)[0]
        return lambda width, height: compute_train_crop(width, height, uniforms, cfg.augment, cfg.image_hw)

    return crop_of


def _make_rand_augment(
    cfg: DataConfig, key: int, mean: Sequence[float]
) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """Return RandAugment of (sample key, image), or None where the settings have none."""
    num_operations = cfg.augment.rand_augment.ops
    if not num_operations:
        return None
    assert len(mean) == cfg.channels, "RandAugment fills with the pixel mean"

    def augment_image(sample_key: int, image: np.ndarray) -> np.ndarray:
        uniforms = draw_uniform_numpy(key, np.array([sample_key]), num_operations * UNIFORMS_PER_OP)
        return rand_augment(image, uniforms.reshape(num_operations, UNIFORMS_PER_OP), cfg, mean)

    return augment_image


def _prefetch_batches(
    cfg: DataConfig, progress: Callable[[], int], plans: Iterator[MicrobatchPlan]
) -> Generator[Batch, None, None]:
    """Yield batches in the order of the plans; cfg.ahead further microbatches decode while the caller uses one."""
    pool = WorkerPool(cfg.threads, cfg.stall_timeout_seconds, progress)
    queue: collections.deque[tuple[PendingBatch, list[Future[None]]]] = collections.deque()

    def submit(plan: MicrobatchPlan) -> tuple[PendingBatch, list[Future[None]]]:
        pending = PendingBatch.allocate(plan, cfg.channels)
        num_samples = len(plan.sample_keys)
        chunk = max(1, min(_ROWS_PER_JOB, -(-num_samples // cfg.threads)))
        futures = [
            pool.submit(FillRowsJob(cfg, pending, range(start, min(start + chunk, num_samples)), pool))
            for start in range(0, num_samples, chunk)
        ]
        return pending, futures

    def next_batch() -> Batch:
        pending, futures = queue.popleft()
        pool.wait_for_jobs(futures)
        return pending.to_batch()

    try:
        for plan in plans:
            queue.append(submit(plan))
            if len(queue) > cfg.prefetch_batches:
                yield next_batch()
        while queue:
            yield next_batch()
    finally:
        pool.close()
