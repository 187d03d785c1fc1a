"""A microbatch while it is read: the plan of its rows, its tensors, and the jobs that decode samples into them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from foveal.data.batch import BadSample, Batch
from foveal.data.config import DataConfig
from foveal.data.image.decode import CropFunction, UndecodableError, decode_crop
from foveal.data.image.targets import AppliedCrop, LabelReader
from foveal.data.image.transforms import CropBox
from foveal.data.sampling.sources import SampleLocation, find_image_member
from foveal.data.workers import WorkerPool, WorkerState
from foveal.errors import DataError, StorageUnreachableError


@dataclass(frozen=True)
class MicrobatchPlan:
    """A microbatch to be read. Its first ``len(sample_keys)`` rows are samples, the rest is padding.

    num_ids: number of ids; an id is the sample key modulo num_ids. locate_by_key: from a sample key to its location.
    crop_of: from (row, sample key) to the crop. replacements: sample keys that may fill a row whose sample does not
    decode; None: such a row stays empty. output_hw: (height, width) of the decoded images. label_reader: reads labels
    that are not in the index. augment_image: from (sample key, cropped image) to the augmented image.
    """

    sample_keys: np.ndarray
    num_ids: int
    num_rows: int
    step: int
    epoch: int
    microbatch_index: int
    locate_by_key: Callable[[int], SampleLocation]
    crop_of: Callable[[int, int], CropFunction]
    replacement_keys: Callable[[int], Iterator[int]] | None
    output_hw: tuple[int, int]
    label_reader: LabelReader | None
    augment_image: Callable[[int, np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class PendingBatch:
    """A microbatch that is being filled: its tensors, its bad samples, and by row the labels read from members."""

    plan: MicrobatchPlan
    batch: Batch
    bad_samples: list[BadSample]
    targets: list[np.ndarray | None]

    @classmethod
    def allocate(cls, plan: MicrobatchPlan, channels: int) -> Self:
        """Allocate the tensors of a microbatch."""
        return cls(plan, _allocate_batch(plan, channels), [], [None] * plan.num_rows)

    def to_batch(self) -> Batch:
        """Return the batch; every row must be filled."""
        plan = self.plan
        targets = None if plan.label_reader is None else plan.label_reader.collate(self.targets, plan.output_hw)
        bad_samples = tuple(sorted(self.bad_samples, key=lambda bad_sample: bad_sample.row))
        return replace(self.batch, bad_samples=bad_samples, targets=targets)


def _allocate_batch(plan: MicrobatchPlan, channels: int) -> Batch:
    """Allocate the tensors of a microbatch, pinned if CUDA is available.

    The caller's thread allocates: a worker thread would create a CUDA context on GPU 0.
    """
    pin = torch.cuda.is_available()
    num_samples = len(plan.sample_keys)
    images = torch.empty((plan.num_rows, channels, *plan.output_hw), dtype=torch.uint8, pin_memory=pin)
    images[num_samples:] = 0
    ids, sample_keys = (torch.full((plan.num_rows,), -1, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    ids[:num_samples] = torch.from_numpy(plan.sample_keys % plan.num_ids)
    sample_keys[:num_samples] = torch.from_numpy(plan.sample_keys)
    return Batch(
        images=images,
        labels=torch.full_like(ids, -1, pin_memory=pin),
        ids=ids,
        sample_keys=sample_keys,
        valid=torch.empty(plan.num_rows, dtype=torch.bool, pin_memory=pin).copy_(ids >= 0),
        step=plan.step,
        epoch=plan.epoch,
        microbatch_index=plan.microbatch_index,
    )


@dataclass(frozen=True)
class FillRowsJob:
    """A job: read, decode, crop and augment the samples of some rows of a microbatch into its tensors."""

    cfg: DataConfig
    pending: PendingBatch
    rows: range
    pool: WorkerPool

    @property
    def plan(self) -> MicrobatchPlan:
        return self.pending.plan

    @property
    def batch(self) -> Batch:
        return self.pending.batch

    def __call__(self, worker: WorkerState) -> None:
        for row in self.rows:
            if self.pool.stop_event.is_set():
                return
            self._fill_row(row, worker)
            worker.num_finished_samples += 1

    def _fill_row(self, row: int, worker: WorkerState) -> None:
        sample_key = int(self.plan.sample_keys[row])
        try:
            self._load_sample(row, sample_key, worker)
        except UndecodableError as error:
            if self.plan.replacement_keys is None:
                replacement_key = self._leave_empty(row)
            else:
                replacement_key = self._load_replacement(row, self.plan.replacement_keys(row), worker, error)
            location = self.plan.locate_by_key(sample_key)
            index = location.shard_index
            bad_sample = BadSample(
                row=row,
                sample_key=sample_key,
                replacement_key=replacement_key,
                split=location.split,
                shard=location.dataset.shard_display_path(location.split, location.shard_number),
                webdataset_key=index.key(location.index_row),
                byte_offset=self._find_image(location)[0],
                reason=str(error),
            )
            self.pending.bad_samples.append(bad_sample)

    def _load_sample(self, row: int, sample_key: int, worker: WorkerState) -> None:
        """Load a sample into a row. Raises: UndecodableError, DataError."""
        location = self.plan.locate_by_key(sample_key)
        # Opening the index, which has the key, can hang. Until it is open the description is the shard only.
        worker.describe_current_sample = lambda: location.dataset.shard_display_path(
            location.split, location.shard_number
        )
        index, cfg, output_hw = location.shard_index, self.cfg, self.plan.output_hw
        worker.describe_current_sample = lambda: (
            f"{location.dataset.shard_display_path(location.split, location.shard_number)}: "
            f"sample '{index.key(location.index_row)}'"
        )
        applied_crops: list[AppliedCrop] = []

        def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
            box, flipped = self.plan.crop_of(row, sample_key)(width, height)
            applied_crops.append(AppliedCrop(width, height, box, flipped, output_hw))
            return box, flipped

        def decode(data: bytes) -> np.ndarray:
            return decode_crop(
                data,
                cfg.channels,
                choose_crop,
                output_hw,
                cfg.augment.interpolation,
                cfg.jpeg_scaling,
                cfg.decode_version,
                location.dataset.manifest.bit_depth,
            )

        image = _read_and_decode(location, self._find_image(location), decode)
        augment_image = self.plan.augment_image
        self.batch.images.numpy()[row] = image if augment_image is None else augment_image(sample_key, image)
        reader = self.plan.label_reader
        if reader is not None:
            member = index.find_member_offset_size(location.index_row, reader.field)
            if member is None:
                raise DataError(
                    f"{location.description} has no member .{reader.field}, which is its label: write its shard again"
                )
            self.pending.targets[row] = _read_and_decode(
                location, member, lambda data: reader.read_label(data, applied_crops[0], location.description)
            )
        self.batch.labels.numpy()[row] = index.labels[location.index_row]

    def _find_image(self, location: SampleLocation) -> tuple[int, int]:
        """Return offset and size, in bytes, of a sample's image. Raises: DataError as ``find_image_member``."""
        reader = self.plan.label_reader
        return find_image_member(location, None if reader is None else reader.field, self.cfg.decode_version)

    def _load_replacement(
        self, row: int, replacement_keys: Iterator[int], worker: WorkerState, reason: UndecodableError
    ) -> int:
        """Load the first of these samples that decodes and return its key.

        reason: why the row's own sample does not. Raises: DataError if none decodes.
        """
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
        location = self.plan.locate_by_key(int(self.plan.sample_keys[row]))
        raise DataError(
            f"{location.description} does not decode, nor does any of the {num_undecodable} samples that could replace "
            f"it ({reason}): run `foveal data verify {location.dataset.folder} --full`"
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
        location.dataset.verify_checksum_once(location.split, location.shard_number)
        if location.dataset.read_bytes(location.shard_index.shard, *member) != data:
            raise StorageUnreachableError(
                f"{location.description} reads differently each time: check its storage, and start again"
            ) from None
        raise
