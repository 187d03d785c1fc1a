"""Batches from the sample order: a plan of microbatches and threads that decode ahead. The loader has no state to save."""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from foveal.data.batch import BadSample, Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import CropFunction, UndecodableError, decode_crop
from foveal.data.image.randaugment import UNIFORMS_PER_OP, rand_augment
from foveal.data.image.targets import AppliedCrop, LabelReader, make_label_reader
from foveal.data.image.transforms import UNIFORMS_PER_CROP, CropBox, compute_eval_crop, compute_train_crop
from foveal.data.sampling.order import batch_index_for_step, microbatches_per_step, rank_slot_range
from foveal.data.sampling.sources import SampleLocation, SampleSource, TrainingSet
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.data.workers import Worker, WorkerPool
from foveal.errors import DataError, StorageUnreachableError
from foveal.seeding import derive_key, draw_uniform_numpy

_ROWS_PER_JOB = 16  # images per decoding job: a few hundredths of a second


@dataclass(frozen=True)
class _MicrobatchPlan:
    """A microbatch to be read. Its first ``len(sample_keys)`` rows are samples, the rest is padding.

    num_ids: number of ids; an id is the sample key modulo num_ids. locate_sample: from a sample key to its location.
    crop_of: from (row, sample key) to the crop. replacements: sample keys that may fill a row whose sample does not
    decode; None: such a row stays empty. output_hw: (height, width) of the decoded images. label_reader: reads labels
    that are not in the index. augment_image: from (sample key, cropped image) to the augmented image.
    """

    sample_keys: np.ndarray
    num_ids: int
    rows: int
    step: int
    epoch: int
    microbatch_index: int
    locate_sample: Callable[[int], SampleLocation]
    crop_of: Callable[[int, int], CropFunction]
    replacements: Callable[[int], Iterator[int]] | None
    output_hw: tuple[int, int]
    label_reader: LabelReader | None
    augment_image: Callable[[int, np.ndarray], np.ndarray] | None = None


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
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over one rank's microbatches for the steps start_step..stop_step-1; leaving stops its threads.

    The first microbatch is number 0 of ``start_step``. skipped_batches: numbers of the batches that no step consumes,
    ascending.
    Raises: ConfigError if ranks, lanes or microbatch_size do not divide; ``next`` raises DataError with shard and sample.
    """
    order = training_set.order
    first_slot, stop_slot = rank_slot_range(order.batch_size, order.num_lanes, rank, world_size)
    num_microbatches = microbatches_per_step(order.batch_size, world_size, microbatch_size)
    assert stop_slot - first_slot == num_microbatches * microbatch_size
    augment_key = derive_key(training_set.seed, "augment")
    label_reader = make_label_reader(cfg, training_set.sources[0].dataset)
    augment_image = _make_rand_augment(cfg, derive_key(training_set.seed, "randaugment"))

    def locate_sample(sample_key: int) -> SampleLocation:
        return training_set.locate_sample(sample_key % training_set.num_ids)

    def plan_microbatches() -> Iterator[_MicrobatchPlan]:
        for step in range(start_step, stop_step):
            batch_index = batch_index_for_step(step, skipped_batches)
            training_set.prefetch_shards(batch_index, first_slot, stop_slot)
            slots = order.assign_slots(batch_index, first_slot, stop_slot)
            sample_keys = training_set.sample_keys(slots)
            for microbatch_index in range(num_microbatches):
                rows = slice(microbatch_index * microbatch_size, (microbatch_index + 1) * microbatch_size)
                columns = [values[rows] for values in (slots.source_numbers, slots.stream_positions, slots.epochs)]

                def replacements(row: int, columns: list[np.ndarray] = columns) -> Iterator[int]:
                    return training_set.replacements(*(int(values[row]) for values in columns))

                yield _MicrobatchPlan(
                    sample_keys=sample_keys[rows],
                    num_ids=training_set.num_ids,
                    rows=microbatch_size,
                    step=step,
                    epoch=order.epoch_at_step(batch_index),
                    microbatch_index=microbatch_index,
                    locate_sample=locate_sample,
                    crop_of=_make_train_crops(cfg, augment_key, sample_keys[rows]),
                    replacements=replacements,
                    output_hw=cfg.image_hw,
                    label_reader=label_reader,
                    augment_image=augment_image,
                )

    with closing(_prefetch_batches(cfg, training_set.progress, plan_microbatches())) as batches:
        yield batches


def eval_batches(
    dataset: Dataset,
    cfg: DataConfig,
    *,
    split: str,
    subset: SubsetName,
    seed: int,
    rank: int,
    world_size: int,
    microbatch_size: int,
) -> Generator[Batch, None, None]:
    """Yield every sample of a subset exactly once over all ranks, in batches of ``microbatch_size`` centre crops.

    All ranks get the same number of batches. Padding rows and samples that do not decode have valid=False, label -1
    and id -1. ``microbatch_index`` counts batches from 0. Closing the generator stops its threads. ``seed`` is the
    training seed: it selects the holdout.
    """
    source = SampleSource(dataset, split, select_subset(dataset, cfg, split=split, subset=subset, seed=seed))
    num_batches = -(-len(source.subset) // (world_size * microbatch_size))
    label_reader = make_label_reader(cfg, dataset)

    def crop_of(_row: int, _sample_key: int) -> CropFunction:
        return lambda width, height: (compute_eval_crop(width, height, cfg.crop_ratio, cfg.eval_image_hw), False)

    def plan_microbatches() -> Iterator[_MicrobatchPlan]:
        for microbatch_index in range(num_batches):
            start = (microbatch_index * world_size + rank) * microbatch_size
            stop = max(start, min(start + microbatch_size, len(source.subset)))
            yield _MicrobatchPlan(
                sample_keys=source.subset.to_sample_ids(np.arange(start, stop, dtype=np.int64)),
                num_ids=source.stop_id,
                rows=microbatch_size,
                step=0,
                epoch=0,
                microbatch_index=microbatch_index,
                locate_sample=source.locate_sample,
                crop_of=crop_of,
                replacements=None,
                output_hw=cfg.eval_image_hw,
                label_reader=label_reader,
            )

    return _prefetch_batches(cfg, dataset.progress, plan_microbatches())


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


def _make_rand_augment(cfg: DataConfig, key: int) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """Return RandAugment of (sample key, image), or None where the settings have none."""
    num_operations = cfg.augment.operations
    if not num_operations:
        return None

    def augment_image(sample_key: int, image: np.ndarray) -> np.ndarray:
        uniforms = draw_uniform_numpy(key, np.array([sample_key]), num_operations * UNIFORMS_PER_OP)
        return rand_augment(image, uniforms.reshape(num_operations, UNIFORMS_PER_OP), cfg.augment)

    return augment_image


def _prefetch_batches(
    cfg: DataConfig, progress: Callable[[], int], plans: Iterator[_MicrobatchPlan]
) -> Generator[Batch, None, None]:
    """Yield batches in the order of the plans; cfg.ahead further microbatches decode while the caller uses one."""
    pool = WorkerPool(cfg.threads, cfg.patience_seconds, progress)
    queue: collections.deque[tuple[_PendingBatch, list[Future[None]]]] = collections.deque()

    def submit(plan: _MicrobatchPlan) -> tuple[_PendingBatch, list[Future[None]]]:
        pending = _PendingBatch(plan, _allocate_batch(cfg, plan), [], [None] * plan.rows)
        num_samples = len(plan.sample_keys)
        chunk = max(1, min(_ROWS_PER_JOB, -(-num_samples // cfg.threads)))
        futures = [
            pool.submit(_FillRowsJob(cfg, pending, range(start, min(start + chunk, num_samples)), pool))
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
            if len(queue) > cfg.ahead:
                yield next_batch()
        while queue:
            yield next_batch()
    finally:
        pool.close()


@dataclass(frozen=True)
class _PendingBatch:
    """A microbatch that is being filled: its tensors, its bad samples, and by row the labels that are not in the index."""

    plan: _MicrobatchPlan
    batch: Batch
    bad_samples: list[BadSample]
    targets: list[np.ndarray | None]

    def to_batch(self) -> Batch:
        """Return the batch; every row must be filled."""
        plan = self.plan
        targets = None if plan.label_reader is None else plan.label_reader.collate(self.targets, plan.output_hw)
        bad_samples = tuple(sorted(self.bad_samples, key=lambda bad_sample: bad_sample.row))
        return replace(self.batch, bad_samples=bad_samples, targets=targets)


def _allocate_batch(cfg: DataConfig, plan: _MicrobatchPlan) -> Batch:
    """Allocate the tensors of a microbatch, pinned if CUDA is available.

    The caller's thread allocates: a worker thread would create a CUDA context on GPU 0.
    """
    pin = torch.cuda.is_available()
    num_samples = len(plan.sample_keys)
    images = torch.empty((plan.rows, cfg.channels, *plan.output_hw), dtype=torch.uint8, pin_memory=pin)
    images[num_samples:] = 0
    ids, sample_keys = (torch.full((plan.rows,), -1, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    ids[:num_samples] = torch.from_numpy(plan.sample_keys % plan.num_ids)
    sample_keys[:num_samples] = torch.from_numpy(plan.sample_keys)
    return Batch(
        images=images,
        labels=torch.full_like(ids, -1, pin_memory=pin),
        ids=ids,
        sample_keys=sample_keys,
        valid=torch.empty(plan.rows, dtype=torch.bool, pin_memory=pin).copy_(ids >= 0),
        step=plan.step,
        epoch=plan.epoch,
        microbatch_index=plan.microbatch_index,
    )


@dataclass(frozen=True)
class _FillRowsJob:
    """A job: read, decode, crop and augment the samples of some rows of a microbatch into its tensors."""

    cfg: DataConfig
    pending: _PendingBatch
    rows: range
    pool: WorkerPool

    @property
    def plan(self) -> _MicrobatchPlan:
        return self.pending.plan

    @property
    def batch(self) -> Batch:
        return self.pending.batch

    def __call__(self, worker: Worker) -> None:
        for row in self.rows:
            if self.pool.stop_event.is_set():
                return
            self._fill_row(row, worker)
            worker.num_finished += 1

    def _fill_row(self, row: int, worker: Worker) -> None:
        sample_key = int(self.plan.sample_keys[row])
        try:
            self._load_sample(row, sample_key, worker)
        except UndecodableError as error:
            if self.plan.replacements is None:
                replacement_key = self._leave_empty(row)
            else:
                replacement_key = self._load_replacement(row, self.plan.replacements(row), worker)
            location = self.plan.locate_sample(sample_key)
            index = location.shard_index
            bad_sample = BadSample(
                row=row,
                sample_key=sample_key,
                replacement_key=replacement_key,
                split=location.split,
                shard=location.dataset.shard_display_path(location.split, location.shard_number),
                webdataset_key=index.key(location.index_row),
                byte_offset=index.find_image(location.index_row)[0],
                reason=str(error),
            )
            self.pending.bad_samples.append(bad_sample)

    def _load_sample(self, row: int, sample_key: int, worker: Worker) -> None:
        """Load a sample into a row. Raises: UndecodableError, DataError."""
        location = self.plan.locate_sample(sample_key)
        # Opening the index, which has the key, can hang. Until it is open the description is the shard only.
        worker.describe_current = lambda: location.dataset.shard_display_path(location.split, location.shard_number)
        index, cfg, output_hw = location.shard_index, self.cfg, self.plan.output_hw
        worker.describe_current = lambda: (
            f"{location.dataset.shard_display_path(location.split, location.shard_number)}: "
            f"sample '{index.key(location.index_row)}'"
        )
        applied_crops: list[AppliedCrop] = []

        def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
            box, flipped = self.plan.crop_of(row, sample_key)(width, height)
            applied_crops.append(AppliedCrop(width, height, box, flipped, output_hw))
            return box, flipped

        def decode(data: bytes) -> np.ndarray:
            return decode_crop(data, cfg.channels, choose_crop, output_hw, cfg.augment.interpolation, cfg.jpeg_scaling)

        image = _read_and_decode(location, index.find_image(location.index_row), decode)
        augment_image = self.plan.augment_image
        self.batch.images.numpy()[row] = image if augment_image is None else augment_image(sample_key, image)
        reader = self.plan.label_reader
        if reader is not None:
            member = index.find_member(location.index_row, reader.field)
            if member is None:
                raise DataError(
                    f"{location.description} has no member .{reader.field}, which is its label: write its shard again"
                )
            self.pending.targets[row] = _read_and_decode(
                location, member, lambda data: reader.read_label(data, applied_crops[0], location.description)
            )
        self.batch.labels.numpy()[row] = index.labels[location.index_row]

    def _load_replacement(self, row: int, replacement_keys: Iterator[int], worker: Worker) -> int:
        """Load the first of these samples that decodes into the row and return its key. Raises: DataError if none does."""
        num_undecodable = 0
        for replacement_key in replacement_keys:
            try:
                self._load_sample(row, replacement_key, worker)
            except UndecodableError:
                num_undecodable += 1
                continue
            batch = self.batch
            batch.sample_keys.numpy()[row] = replacement_key
            batch.ids.numpy()[row] = replacement_key % self.plan.num_ids
            return replacement_key
        location = self.plan.locate_sample(int(self.plan.sample_keys[row]))
        raise DataError(
            f"{location.description} does not decode, nor does any of the {num_undecodable} samples that could replace "
            f"it: run `foveal data verify {location.dataset.folder} --full`"
        )

    def _leave_empty(self, row: int) -> int:
        """Mark a row as invalid and return -1, the key of no replacement."""
        batch = self.batch
        batch.images.numpy()[row] = 0
        for name in ("ids", "sample_keys", "labels"):
            getattr(batch, name).numpy()[row] = -1
        batch.valid.numpy()[row] = False
        self.pending.targets[row] = None
        return -1


def _read_and_decode(
    location: SampleLocation, member: tuple[int, int], decode: Callable[[bytes], np.ndarray]
) -> np.ndarray:
    """Read a member (offset, size) of a sample and return what ``decode`` makes of its bytes.

    Raises: UndecodableError if the bytes do not decode and are the same for every run; DataError if the shard does not
    have the manifest's sha256, StorageUnreachableError if two reads differ. Replacing the sample in these two cases
    would make this run's curve differ from that of an identical run.
    """
    data = location.dataset.read_bytes(location.shard_index.shard, *member)
    try:
        return decode(data)
    except UndecodableError:
        location.dataset.verify_checksum(location.split, location.shard_number)
        if location.dataset.read_bytes(location.shard_index.shard, *member) != data:
            raise StorageUnreachableError(
                f"{location.description} reads differently each time: check its storage, and start again"
            ) from None
        raise
