"""What training draws from: one set of shards, or several in fixed shares, as one line of sample ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveal.data.config import DataConfig, is_remote
from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import ShardIndex
from foveal.data.sampling.order import Order, Slots
from foveal.data.sampling.subset import Part, choose
from foveal.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a sample lies: the n-th shard of a split of a set, and its row in that shard's index."""

    dataset: Dataset
    split: str
    shard: int
    row: int

    @property
    def index(self) -> ShardIndex:
        """The index of the shard."""
        return self.dataset.index(self.split, self.shard)

    @property
    def where(self) -> str:
        """Shard and key, for a sentence."""
        return f"{self.dataset.where(self.split, self.shard)}: sample '{self.index.key(self.row)}'"


@dataclass(frozen=True)
class Source:
    """A part of a split. The ids of its samples are ``first`` and up, in the order of the split's shards."""

    dataset: Dataset
    split: str
    part: Part
    first: int = 0

    @cached_property
    def starts(self) -> np.ndarray:
        """The id of every shard's first sample, int64 [S]."""
        counts = self.dataset.counts(self.split)
        return self.first + np.cumsum(counts) - counts

    @property
    def stop(self) -> int:
        """One more than the last id of the split."""
        return self.first + self.dataset.samples(self.split)

    def find(self, sample: int) -> Place:
        """Where the sample of an id lies."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return Place(self.dataset, self.split, shard, int(sample - self.starts[shard]))


@dataclass(frozen=True)
class TrainingSet:
    """All samples of training and the order they are dealt in, the same on every rank.

    A draw is a sample in an epoch of its own set: id + epoch * ``ids``; where samples come several times in an epoch
    (data.balance), each time counts as an epoch. What a row is augmented and masked with is keyed by its draw, so that a
    sample looks different every time it comes.
    """

    sources: tuple[Source, ...]
    order: Order
    seed: int

    @property
    def ids(self) -> int:
        """How many ids there are: the samples of the splits of all sets."""
        return self.sources[-1].stop

    def draws(self, slots: Slots) -> np.ndarray:
        """The draws of some slots, int64 [n]."""
        draws = np.empty_like(slots.samples)
        for number, source in enumerate(self.sources):
            mine = slots.sources == number
            draws[mine] = self._draws(source, slots.samples[mine], slots.epochs[mine])
        return draws

    def others(self, source: int, position: int, epoch: int) -> Iterator[int]:
        """The draws that stand in for the one at a position, in this order."""
        chosen = self.sources[source]
        for sample in self.order.others(source, position):
            yield int(self._draws(chosen, np.array([sample]), np.array([epoch]))[0])

    def _draws(self, source: Source, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        part = source.part
        return source.first + part.sample_ids(positions) + part.turns(positions, epochs) * self.ids

    def find(self, sample: int) -> Place:
        """Where the sample of an id lies."""
        return next(source for source in self.sources if sample < source.stop).find(sample)

    def prefetch(self, step: int, start: int, stop: int) -> None:
        """Let the sets behind URLs fetch what the slots start..stop-1 need from this step on."""
        if not any(is_remote(source.dataset.folder) for source in self.sources):
            return
        wanted = self.order.shards(step, start, stop)
        for number, source in enumerate(self.sources):
            source.dataset.prefetch(source.split, [shard for which, shard in wanted if which == number])

    def held(self, stop: int) -> tuple[int, int]:
        """Shards behind URLs that the slots 0..stop-1 read from in this window and the next, and their bytes."""
        sizes = [
            source.dataset.manifest.splits[source.split].shards[shard].bytes
            for source, shard in ((self.sources[which], shard) for which, shard in self.order.shards(0, 0, stop))
            if is_remote(source.dataset.folder)
        ]
        return len(sizes), sum(sizes)

    def pulse(self) -> int:
        """A number that grows while bytes arrive."""
        return sum(source.dataset.pulse() for source in self.sources)


def training_set(dataset: Dataset, cfg: DataConfig, *, seed: int, batch: int) -> TrainingSet:
    """The training part of ``dataset`` and of the sets in data.mix, dealt into batches of ``batch`` images.

    Errors: those of ``Dataset.open``, ``choose`` and ``Order``.
    """
    sources = [Source(dataset, cfg.train, choose(dataset, cfg, split=cfg.train, part="train", seed=seed))]
    for other in cfg.mix:
        one = DataConfig.model_validate(_alone(cfg, other.path, other.index, other.split))
        opened = Dataset.open(one)
        kept_out = "data.fold" if cfg.fold else "data.holdout_per_class" if cfg.holdout_per_class else None
        if kept_out and opened.digest(other.split) == dataset.digest(cfg.train):
            raise ConfigError(
                f"data.mix: {other.path} holds the images that {kept_out} keeps out of training: mix in another set, or "
                f"keep nothing out"
            )
        sources.append(Source(opened, other.split, Part(opened.counts(other.split), None), sources[-1].stop))
    mix = [(source.part.counts, other.share) for source, other in zip(sources[1:], cfg.mix, strict=True)]
    order = Order(sources[0].part.counts, batch, cfg.lanes, cfg.window, seed, mix)
    return TrainingSet(tuple(sources), order, seed)


def _alone(cfg: DataConfig, path: str, index: str | None, split: str) -> dict[str, object]:
    """The settings of a set in the mixture: its own place, everything else as it is."""
    return cfg.model_dump() | {"path": path, "index": index, "train": split, "val": split, "mix": ()}


def described(sources: Sequence[Source]) -> dict[str, str]:
    """What is drawn from besides the first set, for the science of a run: digests by name."""
    return {f"data.mix.{number}": source.dataset.digest(source.split) for number, source in enumerate(sources[1:])}
