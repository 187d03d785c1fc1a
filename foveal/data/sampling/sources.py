"""Sources of training samples: one data set or a mixture with fixed shares, under one range of sample ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from foveal.data.config import DataConfig, is_url
from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import ShardIndex
from foveal.data.sampling.lanes import check_set_fills_batch, derive_lanes
from foveal.data.sampling.order import SampleOrder, SampleSlots
from foveal.data.sampling.subset import SplitSubset, select_subset
from foveal.errors import ConfigError, DataError


@dataclass(frozen=True)
class SampleLocation:
    """Location of a sample: data set, split, shard and row in the shard's index."""

    dataset: Dataset
    split: str
    shard_number: int
    index_row: int

    @property
    def shard_index(self) -> ShardIndex:
        """Index of the shard."""
        return self.dataset.shard_index(self.split, self.shard_number)

    @property
    def description(self) -> str:
        """Path of the shard and key of the sample, for messages."""
        path = self.dataset.shard_display_path(self.split, self.shard_number)
        return f"{path}: sample '{self.shard_index.key(self.index_row)}'"


def find_image_member(location: SampleLocation, label_field: str | None, decode_version: int) -> tuple[int, int]:
    """Return offset and size, in bytes, of a sample's image, which is never its label.

    Raises: DataError if the sample has no image beside its label, or if the run is one of decode_version 1 that took the
    label for the image.
    """
    index, row = location.shard_index, location.index_row
    member = index.find_image_offset_size(row, label_field)
    if decode_version == 1 and label_field is not None and member != index.find_image_offset_size(row):
        raise DataError(
            f"{location.description}: data.decode_version=1, the rules of runs before 0.2, takes its label "
            f".{label_field} for its image: start a new run (run.fresh=true) without this setting"
        )
    return member


@dataclass(frozen=True)
class SampleSource:
    """Subset of a split; the split's sample ids start at ``first_id``, in the order of its shards."""

    dataset: Dataset
    split: str
    subset: SplitSubset
    first_id: int = 0

    @cached_property
    def shard_first_ids(self) -> np.ndarray:
        """Id of every shard's first sample, int64 [S]."""
        counts = self.dataset.samples_per_shard(self.split)
        return self.first_id + np.cumsum(counts) - counts

    @property
    def stop_id(self) -> int:
        """End (exclusive) of the split's ids."""
        return self.first_id + self.dataset.num_samples(self.split)

    def locate_sample(self, sample_id: int) -> SampleLocation:
        """Return the location of a sample."""
        shard = int(np.searchsorted(self.shard_first_ids, sample_id, side="right")) - 1
        return SampleLocation(self.dataset, self.split, shard, int(sample_id - self.shard_first_ids[shard]))


@dataclass(frozen=True)
class TrainingSet:
    """All training samples and their order, identical on every rank.

    The sample key, id + epoch * ``num_ids``, identifies one visit of a sample in an epoch of its source; a sample that
    appears several times in an epoch (data.balance) counts each visit as an epoch. Augmentation and masks derive from
    the sample key, so that every visit of a sample differs.
    """

    sources: tuple[SampleSource, ...]
    order: SampleOrder
    seed: int

    @property
    def num_ids(self) -> int:
        """Number of sample ids: samples in the splits of all sources."""
        return self.sources[-1].stop_id

    def sample_keys(self, slots: SampleSlots) -> np.ndarray:
        """Return the sample keys of ``slots``, int64 [n]."""
        keys = np.empty_like(slots.subset_positions)
        for number, source in enumerate(self.sources):
            rows = slots.source_numbers == number
            keys[rows] = self._make_sample_keys(source, slots.subset_positions[rows], slots.source_epochs[rows])
        return keys

    def replacement_keys(self, source_number: int, stream_position: int, epoch: int) -> Iterator[int]:
        """Yield the sample keys that replace a bad sample, in order of preference."""
        source = self.sources[source_number]
        for position in self.order.replacement_subset_positions(source_number, stream_position):
            yield int(self._make_sample_keys(source, np.array([position]), np.array([epoch]))[0])

    def _make_sample_keys(self, source: SampleSource, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        sample_ids = source.first_id + source.subset.to_split_positions(positions)
        return sample_ids + source.subset.visit_numbers(positions, epochs) * self.num_ids

    def locate_sample(self, sample_id: int) -> SampleLocation:
        """Return the location of a sample."""
        return next(source for source in self.sources if sample_id < source.stop_id).locate_sample(sample_id)

    def prefetch_shards(self, batch_index: int, start_slot: int, stop_slot: int) -> None:
        """Prefetch remote shards that slots [start_slot, stop_slot) read from this step on."""
        if not any(is_url(source.dataset.folder) for source in self.sources):
            return
        upcoming = self.order.upcoming_shards(batch_index, start_slot, stop_slot)
        for number, source in enumerate(self.sources):
            shards = [shard for source_number, shard in upcoming if source_number == number]
            source.dataset.prefetch_shards(source.split, shards)

    def required_shards_and_bytes(self, stop_slot: int) -> tuple[int, int]:
        """Return number and bytes of the remote shards that slots [0, stop_slot) read in this window and the next."""
        sizes = []
        for source_number, shard in self.order.upcoming_shards(0, 0, stop_slot):
            source = self.sources[source_number]
            if is_url(source.dataset.folder):
                sizes.append(source.dataset.manifest.splits[source.split].shards[shard].bytes)
        return len(sizes), sum(sizes)

    def download_counter(self) -> int:
        """Return a counter that grows while bytes arrive."""
        return sum(source.dataset.download_counter() for source in self.sources)


def build_training_set(
    dataset: Dataset, cfg: DataConfig, *, seed: int, batch_size: int, num_ranks: int = 1
) -> TrainingSet:
    """Return the training subset of ``dataset`` and the data sets of data.mix, in batches of ``batch_size`` images.

    ``num_ranks``: for the batch that a refusal suggests; the order does not depend on it.
    Raises: DataError, with a batch that fits, if the subset is smaller than a batch; as ``Dataset.open``, ``select_subset`` and ``SampleOrder``.
    """
    subset = select_subset(dataset, cfg, split=cfg.train, subset="train", seed=seed)
    sources = [SampleSource(dataset, cfg.train, subset)]
    for entry in cfg.mix:
        mixed = Dataset.open(DataConfig.model_validate(_mix_settings(cfg, entry.path, entry.index, entry.split)))
        excluding_setting = "data.fold" if cfg.fold else "data.holdout_per_class" if cfg.holdout_per_class else None
        if excluding_setting and mixed.samples_digest(entry.split) == dataset.samples_digest(cfg.train):
            raise ConfigError(
                f"data.mix: {entry.path} holds the images that {excluding_setting} keeps out of training: mix in "
                f"another set, or keep nothing out"
            )
        all_samples = SplitSubset(mixed.samples_per_shard(entry.split), None)
        sources.append(SampleSource(mixed, entry.split, all_samples, sources[-1].stop_id))
    mix = [
        (source.subset.samples_per_shard, entry.fraction) for source, entry in zip(sources[1:], cfg.mix, strict=True)
    ]
    sizes = [len(source.subset) for source in sources]
    first_fraction = 1 - sum(Fraction(repr(entry.fraction)) for entry in cfg.mix)
    check_set_fills_batch(sizes[0], batch_size, Fraction(first_fraction), cfg.lanes, num_ranks)
    num_lanes = derive_lanes(batch_size, sizes) if cfg.lanes is None else cfg.lanes
    order = SampleOrder(sources[0].subset.samples_per_shard, batch_size, num_lanes, cfg.window, seed, mix)
    return TrainingSet(tuple(sources), order, seed)


def _mix_settings(cfg: DataConfig, path: str, index: str | None, split: str) -> dict[str, object]:
    """Return ``cfg`` with the path, index and split of a data set of the mixture."""
    return cfg.model_dump() | {"path": path, "index": index, "train": split, "val": split, "mix": ()}


def collect_mix_facts(sources: Sequence[SampleSource]) -> dict[str, Any]:
    """Return digest and, if stated, bit depth of all sources but the first, by name, for a run's science settings."""
    facts: dict[str, Any] = {}
    for number, source in enumerate(sources[1:]):
        facts[f"data.mix.{number}"] = source.dataset.samples_digest(source.split)
        if source.dataset.manifest.bit_depth is not None:
            facts[f"data.mix.{number}.bit_depth"] = source.dataset.manifest.bit_depth
    return facts
