"""Plans of microbatches: which samples are their rows, and how each is cropped. Arithmetic: no I/O, no state to save.

A plan pickles. A process that decodes asks its copy for the rows of a microbatch by number, so that no list of samples
travels between processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import CropFunction
from foveal.data.image.randaugment import UNIFORMS_PER_OP, rand_augment
from foveal.data.image.targets import LabelReader
from foveal.data.image.transforms import UNIFORMS_PER_CROP, compute_eval_crop, compute_train_crop
from foveal.data.sampling.order import batch_index_for_step, microbatches_per_step, rank_slot_range
from foveal.data.sampling.sources import SampleLocation, SampleSource, TrainingSet
from foveal.seeding import derive_key, draw_uniform_numpy


@dataclass(frozen=True)
class PlannedRows:
    """Samples of consecutive rows of a microbatch; a row past them is padding.

    sample_keys: int64 [n]. crop_of: from (position among these rows, sample key) to the crop. replacement_keys: from
    the position to the sample keys that may fill a row whose sample does not decode; None: such a row stays empty.
    """

    sample_keys: np.ndarray
    crop_of: Callable[[int, int], CropFunction]
    replacement_keys: Callable[[int], Iterator[int]] | None


class BatchPlan(Protocol):
    """The microbatches of one rank, by number from 0.

    num_batches: number of the microbatches. num_rows: rows of each. output_hw: of the decoded images. label_reader: reads labels that are not in the
    index. num_ids: an id is the sample key modulo this number. num_held: microbatches that the consumer holds at a time.
    """

    @property
    def cfg(self) -> DataConfig: ...
    @property
    def num_batches(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def output_hw(self) -> tuple[int, int]: ...
    @property
    def label_reader(self) -> LabelReader | None: ...
    @property
    def num_ids(self) -> int: ...
    @property
    def num_held(self) -> int: ...
    @property
    def datasets(self) -> Sequence[Dataset]: ...

    def position(self, number: int) -> tuple[int, int, int]:
        """Return step, epoch and number within the step of a microbatch."""
        ...

    def plan_rows(self, number: int, rows: range) -> PlannedRows:
        """Return the samples of some rows of a microbatch."""
        ...

    def locate_sample(self, sample_key: int) -> SampleLocation:
        """Return the location of a sample."""
        ...

    def augment(self, sample_key: int, image: np.ndarray) -> np.ndarray:
        """Return a cropped image after the operations that follow the crop."""
        ...

    def prefetch(self, number: int) -> None:
        """Start downloads of what the microbatches from this one on read."""
        ...


@dataclass(frozen=True)
class TrainingBatchPlan:
    """The microbatches of the steps start_step..stop_step-1 of one rank.

    skipped_batches: numbers of the batches that no step consumes, ascending. mean: of the pixels, per channel, for
    RandAugment. Raises: ConfigError if ranks, lanes or microbatch size (``num_rows``) do not divide.
    """

    training_set: TrainingSet
    cfg: DataConfig
    rank: int
    world_size: int
    num_rows: int
    start_step: int
    stop_step: int
    skipped_batches: Sequence[int] = ()
    label_reader: LabelReader | None = None
    mean: Sequence[float] = ()

    def __post_init__(self) -> None:
        assert not self.cfg.augment.rand_augment.ops or len(self.mean) == self.cfg.channels, "RandAugment fills with it"
        first_slot, stop_slot = self._slot_range
        assert stop_slot - first_slot == self._microbatches_per_step * self.num_rows

    @cached_property
    def _slot_range(self) -> tuple[int, int]:
        order = self.training_set.order
        return rank_slot_range(order.batch_size, order.num_lanes, self.rank, self.world_size)

    @cached_property
    def _microbatches_per_step(self) -> int:
        return microbatches_per_step(self.training_set.order.batch_size, self.world_size, self.num_rows)

    @cached_property
    def _crop_key(self) -> int:
        return derive_key(self.training_set.seed, "augment")

    @cached_property
    def _rand_augment_key(self) -> int:
        return derive_key(self.training_set.seed, "randaugment")

    @property
    def output_hw(self) -> tuple[int, int]:
        return self.cfg.image_hw

    @property
    def num_held(self) -> int:
        return 2 * self._microbatches_per_step  # those of a step, until those of the next one have come

    @property
    def num_ids(self) -> int:
        return self.training_set.num_ids

    @property
    def datasets(self) -> list[Dataset]:
        return [source.dataset for source in self.training_set.sources]

    @property
    def num_batches(self) -> int:
        return (self.stop_step - self.start_step) * self._microbatches_per_step

    def position(self, number: int) -> tuple[int, int, int]:
        step, microbatch_index = divmod(number, self._microbatches_per_step)
        epoch = self.training_set.order.epoch_of_batch(self._batch_index(self.start_step + step))
        return self.start_step + step, epoch, microbatch_index

    def plan_rows(self, number: int, rows: range) -> PlannedRows:
        step, _, microbatch_index = self.position(number)
        first_slot = self._slot_range[0] + microbatch_index * self.num_rows
        training_set = self.training_set
        slots = training_set.order.assign_slots(
            self._batch_index(step), first_slot + rows.start, first_slot + rows.stop
        )
        sample_keys = training_set.sample_keys(slots)

        def replacement_keys(position: int) -> Iterator[int]:
            origins = (slots.source_numbers, slots.stream_positions, slots.source_epochs)
            return training_set.replacement_keys(*(int(values[position]) for values in origins))

        return PlannedRows(sample_keys, self._make_crops(sample_keys), replacement_keys)

    def locate_sample(self, sample_key: int) -> SampleLocation:
        return self.training_set.locate_sample(sample_key % self.num_ids)

    def augment(self, sample_key: int, image: np.ndarray) -> np.ndarray:
        num_operations = self.cfg.augment.rand_augment.ops
        if not num_operations:
            return image
        uniforms = draw_uniform_numpy(self._rand_augment_key, np.array([sample_key]), num_operations * UNIFORMS_PER_OP)
        return rand_augment(image, uniforms.reshape(num_operations, UNIFORMS_PER_OP), self.cfg, self.mean)

    def prefetch(self, number: int) -> None:
        self.training_set.prefetch_shards(self._batch_index(self.position(number)[0]), *self._slot_range)

    def _batch_index(self, step: int) -> int:
        return batch_index_for_step(step, self.skipped_batches)

    def _make_crops(self, sample_keys: np.ndarray) -> Callable[[int, int], CropFunction]:
        """Return the crop of (position, sample key). One call hashes all keys; a replacement's is hashed on demand."""
        all_uniforms = draw_uniform_numpy(self._crop_key, sample_keys, UNIFORMS_PER_CROP)

        def crop_of(position: int, sample_key: int) -> CropFunction:
            if sample_key == sample_keys[position]:
                uniforms = all_uniforms[position]
            else:
                uniforms = draw_uniform_numpy(self._crop_key, np.array([sample_key]), UNIFORMS_PER_CROP)[0]
            return lambda width, height: compute_train_crop(
                width, height, uniforms, self.cfg.augment, self.cfg.image_hw
            )

        return crop_of


@dataclass(frozen=True)
class EvaluationBatchPlan:
    """Every sample of a source exactly once over all ranks, in microbatches of ``num_rows`` centre crops.

    All ranks have the same number of microbatches, whose last rows may be padding.
    """

    source: SampleSource
    cfg: DataConfig
    rank: int
    world_size: int
    num_rows: int
    label_reader: LabelReader | None = None

    @property
    def output_hw(self) -> tuple[int, int]:
        return self.cfg.eval_image_hw

    @property
    def num_held(self) -> int:
        return 2

    @property
    def num_ids(self) -> int:
        return self.source.stop_id

    @property
    def datasets(self) -> list[Dataset]:
        return [self.source.dataset]

    @property
    def num_batches(self) -> int:
        return -(-len(self.source.subset) // (self.world_size * self.num_rows))

    def position(self, number: int) -> tuple[int, int, int]:
        return 0, 0, number

    def plan_rows(self, number: int, rows: range) -> PlannedRows:
        first = (number * self.world_size + self.rank) * self.num_rows
        stop = min(first + rows.stop, len(self.source.subset))
        positions = np.arange(first + rows.start, max(first + rows.start, stop), dtype=np.int64)
        return PlannedRows(self.source.subset.to_split_positions(positions), self._crop_of, None)

    def locate_sample(self, sample_key: int) -> SampleLocation:
        return self.source.locate_sample(sample_key)

    def augment(self, sample_key: int, image: np.ndarray) -> np.ndarray:
        return image

    def prefetch(self, number: int) -> None:
        """Start no download: a reader fetches what it reads."""

    def _crop_of(self, _position: int, _sample_key: int) -> CropFunction:
        cfg = self.cfg
        return lambda width, height: (compute_eval_crop(width, height, cfg.eval_crop_ratio, cfg.eval_image_hw), False)
