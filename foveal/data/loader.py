"""From the order to batches: a plan of micro-batches, threads that decode ahead of it, nothing that must be saved."""

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
from foveal.data.image.randaugment import UNIFORMS_PER_OP as CHANGE_COLUMNS
from foveal.data.image.randaugment import rand_augment
from foveal.data.image.targets import AppliedCrop, LabelReader, make_label_reader
from foveal.data.image.transforms import UNIFORMS_PER_CROP, CropBox, compute_eval_crop, compute_train_crop
from foveal.data.sampling.order import batch_index_for_step, microbatches_per_step, rank_slot_range
from foveal.data.sampling.sources import SampleLocation, SampleSource, TrainingSet
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.data.workers import Worker, WorkerPool
from foveal.errors import DataError, StorageUnreachableError
from foveal.seeding import derive_key, draw_uniform_numpy

_ROWS_PER_JOB = (
    16  # images that one thread decodes before it looks whether it is still wanted: a few hundredths of a second
)


@dataclass(frozen=True)
class _MicroBatchPlan:
    """A micro-batch still to be read. Its first ``len(draws)`` rows are samples, the rest is padding.

    samples: ids that there are, a draw's id is the remainder; find: where the sample of a draw lies; view: how a draw is
    cut in a row; others: the draws that may take a row's place when its own does not decode; none: the row is left empty.
    sides: (height, width) of what is seen; labels: how those are read that no index has; changed: what
    becomes of the image of a draw after it was cut.
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
    """The micro-batches of one rank for the steps start..stop-1, from micro 0 of ``start``; leaving stops the threads.

    at_once: images of a micro-batch; skipped: numbers of the batches that no step takes, ascending.
    Raises: ConfigError if ranks, lanes or at_once do not divide; ``next`` raises DataError that names shard and sample.
    """
    order = training_set.order
    first, last = rank_slot_range(order.batch_size, order.num_lanes, rank, world_size)
    micros = microbatches_per_step(order.batch_size, world_size, microbatch_size)
    assert last - first == micros * microbatch_size
    place = derive_key(training_set.seed, "augment")
    labels, changed = (
        make_label_reader(cfg, training_set.sources[0].dataset),
        _make_rand_augment(cfg, derive_key(training_set.seed, "randaugment")),
    )

    def find(draw: int) -> SampleLocation:
        return training_set.locate_sample(draw % training_set.num_ids)

    def plan() -> Iterator[_MicroBatchPlan]:
        for step in range(start_step, stop_step):
            number = batch_index_for_step(step, skipped_batches)
            training_set.prefetch_shards(number, first, last)
            slots = order.assign_slots(number, first, last)
            draws = training_set.sample_keys(slots)
            for micro in range(micros):
                part = slice(micro * microbatch_size, (micro + 1) * microbatch_size)
                places = [values[part] for values in (slots.source_numbers, slots.stream_positions, slots.epochs)]

                def others(row: int, places: list[np.ndarray] = places) -> Iterator[int]:
                    return training_set.replacements(*(int(values[row]) for values in places))

                view, epoch = _make_train_crops(cfg, place, draws[part]), order.epoch_at_step(number)
                yield _MicroBatchPlan(
                    sample_keys=draws[part],
                    num_ids=training_set.num_ids,
                    rows=microbatch_size,
                    step=step,
                    epoch=epoch,
                    microbatch_index=micro,
                    locate_sample=find,
                    crop_of=view,
                    replacements=others,
                    output_hw=cfg.image_hw,
                    label_reader=labels,
                    augment_image=changed,
                )

    with closing(_prefetch_batches(cfg, training_set.progress, plan())) as batches:
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
    """Every sample of a part exactly once over all ranks, in batches of ``at_once`` rows, centre-cropped.

    All ranks get the same number of batches; rows that only fill up, and samples that do not decode, have valid=False,
    label and id -1. The micro of a batch counts from 0. Closing the generator stops its threads. ``seed`` is that of
    training: it decides which samples are held out.
    """
    source = SampleSource(dataset, split, select_subset(dataset, cfg, split=split, subset=subset, seed=seed))
    rounds = -(-len(source.subset) // (world_size * microbatch_size))
    labels = make_label_reader(cfg, dataset)

    def view(_row: int, _draw: int) -> CropFunction:
        return lambda width, height: (compute_eval_crop(width, height, cfg.crop_ratio, cfg.eval_image_hw), False)

    def plan() -> Iterator[_MicroBatchPlan]:
        for turn in range(rounds):
            begin = (turn * world_size + rank) * microbatch_size
            positions = np.arange(begin, max(begin, min(begin + microbatch_size, len(source.subset))), dtype=np.int64)
            ids = source.subset.to_sample_ids(positions)
            yield _MicroBatchPlan(
                ids,
                source.stop_id,
                microbatch_size,
                0,
                0,
                turn,
                source.locate_sample,
                view,
                None,
                cfg.eval_image_hw,
                labels,
            )

    return _prefetch_batches(cfg, dataset.progress, plan())


def _make_train_crops(cfg: DataConfig, place: int, draws: np.ndarray) -> Callable[[int, int], CropFunction]:
    """How the draws of a micro-batch are cut: their numbers are hashed all at once, those of a stand-in when it comes."""
    numbers = draw_uniform_numpy(place, draws, UNIFORMS_PER_CROP)

    def view(row: int, draw: int) -> CropFunction:
        mine = numbers[row] if draw == draws[row] else draw_uniform_numpy(place, np.array([draw]), UNIFORMS_PER_CROP)[0]
        return lambda width, height: compute_train_crop(width, height, mine, cfg.augment, cfg.image_hw)

    return view


def _make_rand_augment(cfg: DataConfig, place: int) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """What RandAugment makes of the image of a draw, if it is asked for."""
    operations = cfg.augment.operations
    if not operations:
        return None

    def changed(draw: int, image: np.ndarray) -> np.ndarray:
        numbers = draw_uniform_numpy(place, np.array([draw]), operations * CHANGE_COLUMNS)
        return rand_augment(image, numbers.reshape(operations, CHANGE_COLUMNS), cfg.augment)

    return changed


def _prefetch_batches(
    cfg: DataConfig, pulse: Callable[[], int], plan: Iterator[_MicroBatchPlan]
) -> Generator[Batch, None, None]:
    """Batches in the order of the plan; cfg.ahead of them are in work while the caller has one."""
    crew = WorkerPool(cfg.threads, cfg.patience_seconds, pulse)
    waiting: collections.deque[tuple[_PendingBatch, list[Future[None]]]] = collections.deque()

    def begin(micro: _MicroBatchPlan) -> tuple[_PendingBatch, list[Future[None]]]:
        begun = _PendingBatch(micro, _allocate_batch(cfg, micro), [], [None] * micro.rows)
        chunk = max(1, min(_ROWS_PER_JOB, -(-len(micro.sample_keys) // cfg.threads)))
        jobs = [
            crew.submit(_FillRowsJob(cfg, begun, range(at, min(at + chunk, len(micro.sample_keys))), crew))
            for at in range(0, len(micro.sample_keys), chunk)
        ]
        return begun, jobs

    def finished() -> Batch:
        begun, jobs = waiting.popleft()
        crew.wait_for_jobs(jobs)
        return begun.to_batch()

    try:
        for micro in plan:
            waiting.append(begin(micro))
            if len(waiting) > cfg.ahead:
                yield finished()
        while waiting:
            yield finished()
    finally:
        crew.close()


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch that is being filled: its tensors, its bad samples, and the labels that no index has, by row."""

    plan: _MicroBatchPlan
    batch: Batch
    bad_samples: list[BadSample]
    targets: list[np.ndarray | None]

    def to_batch(self) -> Batch:
        """The batch, once every row is filled."""
        micro = self.plan
        targets = None if micro.label_reader is None else micro.label_reader.collate(self.targets, micro.output_hw)
        return replace(
            self.batch, bad_samples=tuple(sorted(self.bad_samples, key=lambda one: one.row)), targets=targets
        )


def _allocate_batch(cfg: DataConfig, micro: _MicroBatchPlan) -> Batch:
    """Room for a micro-batch, pinned where there is a GPU (by the caller's thread: a worker's would open GPU 0)."""
    pin = torch.cuda.is_available()
    images = torch.empty((micro.rows, cfg.channels, *micro.output_hw), dtype=torch.uint8, pin_memory=pin)
    images[len(micro.sample_keys) :] = 0
    ids, draws = (torch.full((micro.rows,), -1, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    ids[: len(micro.sample_keys)] = torch.from_numpy(micro.sample_keys % micro.num_ids)
    draws[: len(micro.sample_keys)] = torch.from_numpy(micro.sample_keys)
    return Batch(
        images=images,
        labels=torch.full_like(ids, -1, pin_memory=pin),
        ids=ids,
        sample_keys=draws,
        valid=torch.empty(micro.rows, dtype=torch.bool, pin_memory=pin).copy_(ids >= 0),
        step=micro.step,
        epoch=micro.epoch,
        microbatch_index=micro.microbatch_index,
    )


@dataclass(frozen=True)
class _FillRowsJob:
    """A job: read, decode and cut the samples of some rows of a micro-batch into its tensors."""

    cfg: DataConfig
    pending: _PendingBatch
    rows: range
    pool: WorkerPool

    @property
    def plan(self) -> _MicroBatchPlan:
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
        draw = int(self.plan.sample_keys[row])
        try:
            self._load_sample(row, draw, worker)
        except UndecodableError as error:
            others = self.plan.replacements
            taken = self._leave_empty(row) if others is None else self._load_replacement(row, others(row), worker)
            place = self.plan.locate_sample(draw)
            key, offset = place.shard_index.key(place.index_row), place.shard_index.find_image(place.index_row)[0]
            shard = place.dataset.shard_display_path(place.split, place.shard_number)
            self.pending.bad_samples.append(BadSample(row, draw, taken, place.split, shard, key, offset, str(error)))

    def _load_sample(self, row: int, draw: int, worker: Worker) -> None:
        """Put the sample of a draw into a row. Raises: Undecodable, DataError."""
        place = self.plan.locate_sample(draw)
        # What is said of a thread that hangs must not hang itself: reading the index, for the key, can.
        worker.describe_current = lambda: place.dataset.shard_display_path(place.split, place.shard_number)
        index, cfg, sides, seen = place.shard_index, self.cfg, self.plan.output_hw, []
        worker.describe_current = lambda: (
            f"{place.dataset.shard_display_path(place.split, place.shard_number)}: sample '{index.key(place.index_row)}'"
        )

        def view(width: int, height: int) -> tuple[CropBox, bool]:
            box, flipped = self.plan.crop_of(row, draw)(width, height)
            seen.append(AppliedCrop(width, height, box, flipped, sides))
            return box, flipped

        def image(data: bytes) -> np.ndarray:
            return decode_crop(data, cfg.channels, view, sides, cfg.augment.interpolation, cfg.jpeg_scaling)

        found = _read_and_decode(place, index.find_image(place.index_row), image)
        changed = self.plan.augment_image
        self.batch.images.numpy()[row] = found if changed is None else changed(draw, found)
        labels = self.plan.label_reader
        if labels is not None:
            member = index.find_member(place.index_row, labels.field)
            if member is None:
                raise DataError(
                    f"{place.description} has no member .{labels.field}, which is its label: write its shard again"
                )
            self.pending.targets[row] = _read_and_decode(
                place, member, lambda data: labels.read_label(data, seen[0], place.description)
            )
        self.batch.labels.numpy()[row] = index.labels[place.index_row]

    def _load_replacement(self, row: int, others: Iterator[int], worker: Worker) -> int:
        """Put the first good one of these draws in the row; which one. Raises: DataError if there is none."""
        tried = 0
        for other in others:
            try:
                self._load_sample(row, other, worker)
            except UndecodableError:
                tried += 1
                continue
            batch = self.batch
            batch.sample_keys.numpy()[row] = other
            batch.ids.numpy()[row] = other % self.plan.num_ids
            return other
        place = self.plan.locate_sample(int(self.plan.sample_keys[row]))
        raise DataError(
            f"{place.description} does not decode, nor does any of the {tried} samples that could stand in for it: "
            f"run `foveal data verify {place.dataset.folder} --full`"
        )

    def _leave_empty(self, row: int) -> int:
        batch = self.batch
        batch.images.numpy()[row] = 0
        for name in ("ids", "sample_keys", "labels"):
            getattr(batch, name).numpy()[row] = -1
        batch.valid.numpy()[row] = False
        self.pending.targets[row] = None
        return -1


def _read_and_decode(place: SampleLocation, member: tuple[int, int], look: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """What a look at the bytes of a member of a sample gives.

    Raises: Undecodable where it does not decode and is bad for good, not for a moment or on this node only; DataError if
    the shard's bytes are not those of the manifest, or change from one read to the next: replacing the sample then would
    give this run another curve than its twin.
    """
    data = place.dataset.read_bytes(place.shard_index.shard, *member)
    try:
        return look(data)
    except UndecodableError:
        place.dataset.verify_checksum(place.split, place.shard_number)
        if place.dataset.read_bytes(place.shard_index.shard, *member) != data:
            raise StorageUnreachableError(
                f"{place.description} reads differently each time: see whether its storage is sound, and start again"
            ) from None
        raise
