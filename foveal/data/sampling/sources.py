"""What training draws from: one set of shards, or several in fixed shares, as one line of sample ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveal.data.config import DataConfig, is_remote
from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import ShardIndex
from foveal.data.sampling.order import SampleOrder, SampleSlots
from foveal.data.sampling.subset import SplitSubset, select_subset
from foveal.errors import ConfigError


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample lies: the n-th shard of a split of a set, and its row in that shard's index."""

    dataset: Dataset
    split: str
    shard_number: int
    index_row: int

    @property
    def shard_index(self) -> ShardIndex:
        """The index of the shard."""
        return self.dataset.shard_index(self.split, self.shard_number)

    @property
    def description(self) -> str:
        """Shard and key, for a sentence."""
        return f"{self.dataset.shard_display_path(self.split, self.shard_number)}: sample '{self.shard_index.key(self.index_row)}'"


@dataclass(frozen=True)
class SampleSource:
    """A part of a split. The ids of its samples are ``first`` and up, in the order of the split's shards."""

    dataset: Dataset
    split: str
    subset: SplitSubset
    first_id: int = 0

    @cached_property
    def shard_first_ids(self) -> np.ndarray:
        """The id of every shard's first sample, int64 [S]."""
        counts = self.dataset.samples_per_shard(self.split)
        return self.first_id + np.cumsum(counts) - counts

    @property
    def stop_id(self) -> int:
        """One more than the last id of the split."""
        return self.first_id + self.dataset.num_samples(self.split)

    def locate_sample(self, sample_id: int) -> SampleLocation:
        """Where the sample of an id lies."""
        shard = int(np.searchsorted(self.shard_first_ids, sample_id, side="right")) - 1
        return SampleLocation(self.dataset, self.split, shard, int(sample_id - self.shard_first_ids[shard]))


@dataclass(frozen=True)
class TrainingSet:
    """All samples of training and the order they are dealt in, the same on every rank.

    A draw is a sample in an epoch of its own set: id + epoch * ``ids``; where samples come several times in an epoch
    (data.balance), each time counts as an epoch. What a row is augmented and masked with is keyed by its draw, so that a
    sample looks different every time it comes.
    """

    sources: tuple[SampleSource, ...]
    order: SampleOrder
    seed: int

    @property
    def num_ids(self) -> int:
        """How many ids there are: the samples of the splits of all sets."""
        return self.sources[-1].stop_id

    def sample_keys(self, slots: SampleSlots) -> np.ndarray:
        """The draws of some slots, int64 [n]."""
        draws = np.empty_like(slots.subset_positions)
        for number, source in enumerate(self.sources):
            mine = slots.source_numbers == number
            draws[mine] = self._make_sample_keys(source, slots.subset_positions[mine], slots.epochs[mine])
        return draws

    def replacements(self, source_number: int, stream_position: int, epoch: int) -> Iterator[int]:
        """The draws that stand in for the one at a position, in this order."""
        chosen = self.sources[source_number]
        for sample in self.order.replacements(source_number, stream_position):
            yield int(self._make_sample_keys(chosen, np.array([sample]), np.array([epoch]))[0])

    def _make_sample_keys(self, source: SampleSource, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        part = source.subset
        return (
            source.first_id
            + part.to_sample_ids(positions)
            + part.count_earlier_visits(positions, epochs) * self.num_ids
        )

    def locate_sample(self, sample_id: int) -> SampleLocation:
        """Where the sample of an id lies."""
        return next(source for source in self.sources if sample_id < source.stop_id).locate_sample(sample_id)

    def prefetch_shards(self, step: int, start_slot: int, stop_slot: int) -> None:
        """Let the sets behind URLs fetch what the slots start..stop-1 need from this step on."""
        if not any(is_remote(source.dataset.folder) for source in self.sources):
            return
        wanted = self.order.upcoming_shards(step, start_slot, stop_slot)
        for number, source in enumerate(self.sources):
            source.dataset.prefetch_shards(source.split, [shard for which, shard in wanted if which == number])

    def cached_size(self, stop_slot: int) -> tuple[int, int]:
        """Shards behind URLs that the slots 0..stop-1 read from in this window and the next, and their bytes."""
        sizes = [
            source.dataset.manifest.splits[source.split].shards[shard].bytes
            for source, shard in (
                (self.sources[which], shard) for which, shard in self.order.upcoming_shards(0, 0, stop_slot)
            )
            if is_remote(source.dataset.folder)
        ]
        return len(sizes), sum(sizes)

    def progress(self) -> int:
        """A number that grows while bytes arrive."""
        return sum(source.dataset.progress() for source in self.sources)


def build_training_set(dataset: Dataset, cfg: DataConfig, *, seed: int, batch_size: int) -> TrainingSet:
    """The training part of ``dataset`` and of the sets in data.mix, dealt into batches of ``batch`` images.

    Raises: those of ``Dataset.open``, ``choose`` and ``Order``.
    """
    sources = [
        SampleSource(dataset, cfg.train, select_subset(dataset, cfg, split=cfg.train, subset="train", seed=seed))
    ]
    for other in cfg.mix:
        one = DataConfig.model_validate(_mix_settings(cfg, other.path, other.index, other.split))
        opened = Dataset.open(one)
        kept_out = "data.fold" if cfg.fold else "data.holdout_per_class" if cfg.holdout_per_class else None
        if kept_out and opened.digest(other.split) == dataset.digest(cfg.train):
            raise ConfigError(
                f"data.mix: {other.path} holds the images that {kept_out} keeps out of training: mix in another set, or "
                f"keep nothing out"
            )
        sources.append(
            SampleSource(
                opened, other.split, SplitSubset(opened.samples_per_shard(other.split), None), sources[-1].stop_id
            )
        )
    mix = [(source.subset.samples_per_shard, other.share) for source, other in zip(sources[1:], cfg.mix, strict=True)]
    order = SampleOrder(sources[0].subset.samples_per_shard, batch_size, cfg.lanes, cfg.window, seed, mix)
    return TrainingSet(tuple(sources), order, seed)


def _mix_settings(cfg: DataConfig, path: str, index: str | None, split: str) -> dict[str, object]:
    """The settings of a set in the mixture: its own place, everything else as it is."""
    return cfg.model_dump() | {"path": path, "index": index, "train": split, "val": split, "mix": ()}


def collect_mix_digests(sources: Sequence[SampleSource]) -> dict[str, str]:
    """What is drawn from besides the first set, for the science of a run: digests by name."""
    return {f"data.mix.{number}": source.dataset.digest(source.split) for number, source in enumerate(sources[1:])}
