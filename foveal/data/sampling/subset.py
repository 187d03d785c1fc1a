"""Which samples of a split take part: all, a few per class, or those kept out of training, held out or as a fold."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.errors import ConfigError, DataError
from foveal.seeding import derive_key, hash_ids

SubsetName = Literal["train", "holdout", "fold", "all"]


@dataclass(frozen=True)
class SplitSubset:
    """counts: samples per shard, int64 [S]; ids: the chosen sample ids, ascending, or nothing for all of the split.

    An id that comes several times in an epoch stands there as often: copies numbers them from 0, and no id has more than
    ``most``.
    """

    samples_per_shard: np.ndarray
    chosen_ids: np.ndarray | None
    copy_numbers: np.ndarray | None = None
    max_copies: int = 1

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def count_earlier_visits(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """How often the samples at positions in this part had their turn before, if each had ``most`` in an epoch.

        It is the epoch, where no sample comes twice in one: what a sample's randomness is keyed by.
        """
        return epochs if self.copy_numbers is None else epochs * self.max_copies + self.copy_numbers[positions]

    def to_sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """From positions in this part to sample ids in the split."""
        return positions if self.chosen_ids is None else self.chosen_ids[positions]


@dataclass(frozen=True)
class EvalSplit:
    """What a run is judged on: the name of its numbers, and a part of a split."""

    metric_prefix: Literal["val", "fold"]
    split: str
    subset: SubsetName


def eval_split(cfg: DataConfig) -> EvalSplit:
    """The samples that say how good a run is: data.val, or the fold that is kept out of training."""
    return EvalSplit("val", cfg.val, "all") if cfg.fold is None else EvalSplit("fold", cfg.train, "fold")


def select_subset(dataset: Dataset, cfg: DataConfig, *, split: str, subset: SubsetName, seed: int) -> SplitSubset:
    """The samples of a part of a split.

    all: the whole split. fold: the part that data.fold keeps out of training. Of what it leaves, holdout:
    data.holdout_per_class of every class, and train: data.per_class of every class, or, if that is not set, everything
    but the holdout; with data.balance, samples of small classes several times. The draw depends on the seed and the
    sample ids alone.
    Raises: ConfigError for an empty holdout or fold, DataError for a class with too few samples (or, with data.balance,
    none) or samples without labels.
    """
    counts = dataset.samples_per_shard(split)
    if subset == "holdout" and not cfg.holdout_per_class:
        raise ConfigError("data.holdout_per_class=0 leaves no holdout to evaluate on: set it, or use another part")
    if subset == "fold" and cfg.fold is None:
        raise ConfigError("data.fold=null leaves no fold to evaluate on: set it, or use another part")
    rest = cfg.per_class is not None or cfg.holdout_per_class > 0
    balanced = cfg.balance > 0 and subset == "train"
    if subset == "all" or not (rest or balanced or cfg.fold is not None):
        return SplitSubset(counts, None)
    if cfg.fold is not None and cfg.labels != "class":
        raise ConfigError(
            f"data.fold is cut class by class, and data.labels={cfg.labels} gives an image no class of its own: "
            f"cross-validate with data.labels=class"
        )
    labels = dataset.labels(split)
    if labels.min() < 0:
        raise DataError(
            f"{dataset.folder}: {int((labels < 0).sum())} samples of split '{split}' have no label; "
            f"data.per_class, data.holdout_per_class, data.balance and data.fold need one for each"
        )
    if balanced or cfg.fold is not None:
        _refuse_empty(dataset, labels, split, "data.balance" if cfg.fold is None else "data.fold")
    among = np.arange(len(labels))
    if cfg.fold is not None:
        in_fold = _assign_folds(dataset, labels, cfg.fold.of, derive_key(seed, "folds")) == cfg.fold.number
        among = among[in_fold if subset == "fold" else ~in_fold]
    chosen = (
        _sample_per_class(dataset, cfg, labels, among, subset, derive_key(seed, "per_class"))
        if rest and subset != "fold"
        else among
    )
    copies, most = None, 1
    if balanced:
        times = _repeat_counts(labels[chosen], chosen, cfg.balance, derive_key(seed, "balance"))
        copies = np.concatenate([np.arange(each) for each in times])
        chosen, most = np.repeat(chosen, times), int(times.max())
    per_shard, _ = np.histogram(chosen, bins=np.concatenate([[0], np.cumsum(counts)]))
    return SplitSubset(per_shard.astype(np.int64), chosen, copies, most)


def _refuse_empty(dataset: Dataset, labels: np.ndarray, split: str, setting: str) -> None:
    """Raises: DataError for a class of the data set that no sample of the split is of."""
    names = dataset.classes or ()
    for name, samples in zip(names, np.bincount(labels, minlength=len(names)), strict=False):
        if not samples:
            raise DataError(
                f"{dataset.folder}: class '{name}' has no sample in split '{split}', and {setting} needs some of each"
            )


def _repeat_counts(labels: np.ndarray, ids: np.ndarray, balance: float, place: int) -> np.ndarray:
    """How often each sample comes in an epoch: a class of n samples n (largest / n) ** balance times in all, rounded."""
    times = np.empty(len(ids), dtype=np.int64)
    counts = np.bincount(labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = round(len(members) * float(counts.max() / len(members)) ** balance)
        whole, rest = divmod(wanted, len(members))
        times[members] = whole
        times[members[np.argsort(hash_ids(place, ids[members]), kind="stable")[:rest]]] += 1
    return times


def _assign_folds(dataset: Dataset, labels: np.ndarray, of: int, place: int) -> np.ndarray:
    """The fold of every sample, int64 [N], in [0, of).

    The samples, class by class and shuffled within each, are dealt out in turn as one line: the folds' shares of a class
    differ by at most one sample, and so do the folds. Raises: DataError for a class that some fold would lack.
    """
    for label, samples in zip(*np.unique(labels, return_counts=True), strict=True):
        if samples < of:
            name = f" ('{dataset.classes[label]}')" if dataset.classes and label < len(dataset.classes) else ""
            raise DataError(
                f"{dataset.folder}: class {label}{name} has {samples} samples, too few for {of} folds that each hold some "
                f"of it: make fewer folds"
            )
    line = np.lexsort((hash_ids(place, np.arange(len(labels))), labels))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[line] = np.arange(len(labels)) % of
    return folds


def _sample_per_class(
    dataset: Dataset, cfg: DataConfig, labels: np.ndarray, among: np.ndarray, part: SubsetName, place: int
) -> np.ndarray:
    """The train or the holdout part of the samples ``among``, ids of the split, ascending."""
    wanted, theirs = cfg.per_class or 0, labels[among]
    drawn = []
    for label in np.unique(labels):
        members = among[theirs == label]
        needed = wanted + cfg.holdout_per_class
        if len(members) < needed or (cfg.per_class is None and len(members) == needed):
            outside = "" if cfg.fold is None else f" outside fold {cfg.fold.number} of {cfg.fold.of}"
            raise DataError(
                f"{dataset.folder}: class {int(label)} has {len(members)} samples{outside}, too few for "
                f"data.per_class={wanted} and data.holdout_per_class={cfg.holdout_per_class}"
            )
        members = members[np.argsort(hash_ids(place, members), kind="stable")]
        if part == "holdout":
            drawn.append(members[wanted:needed])
        else:
            drawn.append(members[: cfg.per_class] if cfg.per_class else members[needed:])
    return np.sort(np.concatenate(drawn))
