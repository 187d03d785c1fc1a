"""Which samples of a split take part: all, a few per class, or those held out of training."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.errors import ConfigError, DataError
from foveal.seeding import key, ranks_of

PartName = Literal["train", "holdout", "all"]


@dataclass(frozen=True)
class Part:
    """counts: samples per shard, int64 [S]; ids: the chosen sample ids, ascending, or nothing for all of the split.

    An id that comes several times in an epoch stands there as often: copies numbers them from 0, and no id has more than
    ``most``.
    """

    counts: np.ndarray
    ids: np.ndarray | None
    copies: np.ndarray | None = None
    most: int = 1

    def __len__(self) -> int:
        return int(self.counts.sum())

    def turns(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """How often the samples at positions in this part had their turn before, if each had ``most`` in an epoch.

        It is the epoch, where no sample comes twice in one: what a sample's randomness is keyed by.
        """
        return epochs if self.copies is None else epochs * self.most + self.copies[positions]

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """From positions in this part to sample ids in the split."""
        return positions if self.ids is None else self.ids[positions]


def choose(dataset: Dataset, cfg: DataConfig, *, split: str, part: PartName, seed: int) -> Part:
    """The samples of a part of a split.

    all: the whole split. holdout: data.holdout_per_class of every class. train: data.per_class of every class, or, if
    that is not set, everything but the holdout; with data.balance, samples of small classes several times. The draw
    depends on the seed and the sample ids alone.
    Errors: ConfigError for an empty holdout, DataError for a class with too few samples or samples without labels.
    """
    counts = dataset.counts(split)
    if part == "holdout" and not cfg.holdout_per_class:
        raise ConfigError("data.holdout_per_class=0 leaves no holdout to evaluate on: set it, or use another part")
    wanted = cfg.per_class is not None or cfg.holdout_per_class or (cfg.balance and part == "train")
    if part == "all" or not wanted:
        return Part(counts, None)
    labels = dataset.labels(split)
    if labels.min() < 0:
        raise DataError(
            f"{dataset.folder}: {int((labels < 0).sum())} samples of split '{split}' have no label; "
            f"data.per_class, data.holdout_per_class and data.balance need one for each"
        )
    chosen, copies, most = _drawn(dataset, cfg, labels, part, key(seed, "per_class")), None, 1
    if cfg.balance and part == "train":
        times = _times(labels[chosen], chosen, cfg.balance, key(seed, "balance"))
        copies = np.concatenate([np.arange(each) for each in times])
        chosen, most = np.repeat(chosen, times), int(times.max())
    per_shard, _ = np.histogram(chosen, bins=np.concatenate([[0], np.cumsum(counts)]))
    return Part(per_shard.astype(np.int64), chosen, copies, most)


def _times(labels: np.ndarray, ids: np.ndarray, balance: float, place: int) -> np.ndarray:
    """How often each sample comes in an epoch: a class of n samples n (largest / n) ** balance times in all, rounded."""
    times = np.empty(len(ids), dtype=np.int64)
    counts = np.bincount(labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = round(len(members) * float(counts.max() / len(members)) ** balance)
        whole, rest = divmod(wanted, len(members))
        times[members] = whole
        times[members[np.argsort(ranks_of(place, ids[members]), kind="stable")[:rest]]] += 1
    return times


def _drawn(dataset: Dataset, cfg: DataConfig, labels: np.ndarray, part: PartName, place: int) -> np.ndarray:
    wanted = cfg.per_class or 0
    drawn = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        needed = wanted + cfg.holdout_per_class
        if len(members) < needed or (cfg.per_class is None and len(members) == needed):
            raise DataError(
                f"{dataset.folder}: class {int(label)} has {len(members)} samples, too few for data.per_class={wanted}"
                f" and data.holdout_per_class={cfg.holdout_per_class}"
            )
        members = members[np.argsort(ranks_of(place, members), kind="stable")]
        if part == "holdout":
            drawn.append(members[wanted:needed])
        else:
            drawn.append(members[: cfg.per_class] if cfg.per_class else members[needed:])
    return np.sort(np.concatenate(drawn))
