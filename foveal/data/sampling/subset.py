"""Subsets of a split: all samples, training samples, holdout or cross-validation fold."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.errors import ConfigError, DataError
from foveal.seeding import derive_key, hash_ids

SubsetName = Literal["train", "holdout", "fold", "all", "bank"]

# Features of 50,000 images of width 1024 are 0.2 GB; CIFAR-10 fits completely, ImageNet-1k keeps 50 images per class.
MAX_BANK_IMAGES = 50_000


@dataclass(frozen=True)
class SplitSubset:
    """Subset of a split.

    samples_per_shard: int64 [S]. split_positions: ascending sample ids (None: the complete split); an oversampled id is
    repeated. copy_numbers: number of each repetition, from 0 (None: no repetitions). max_copies: most repetitions of an
    id.
    """

    samples_per_shard: np.ndarray
    split_positions: np.ndarray | None
    copy_numbers: np.ndarray | None = None
    max_copies: int = 1

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def visit_numbers(self, subset_positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the number of visits before each visit, counting ``max_copies`` visits per epoch, int64 [n].

        Without repetitions this is the epoch. A sample's randomness is keyed by this number.
        """
        return epochs if self.copy_numbers is None else epochs * self.max_copies + self.copy_numbers[subset_positions]

    def to_split_positions(self, subset_positions: np.ndarray) -> np.ndarray:
        """Map positions in the subset to sample ids in the split."""
        return subset_positions if self.split_positions is None else self.split_positions[subset_positions]


@dataclass(frozen=True)
class EvalSplit:
    """Evaluation data of a run: prefix of the metrics' names, split and subset."""

    metric_prefix: Literal["val", "fold"]
    split: str
    subset: SubsetName


def eval_split(cfg: DataConfig) -> EvalSplit:
    """Return the evaluation data: data.val, or the fold excluded from training."""
    return EvalSplit("val", cfg.val, "all") if cfg.fold is None else EvalSplit("fold", cfg.train, "fold")


def select_subset(dataset: Dataset, cfg: DataConfig, *, split: str, subset: SubsetName, seed: int) -> SplitSubset:
    """Return a subset of a split.

    all: the complete split. fold: the samples that data.fold excludes from training. holdout: data.holdout_per_class
    samples of every class outside the fold. train: data.samples_per_class samples of every class outside fold and holdout
    (null: all of them); data.balance repeats samples of small classes. bank: at most ``MAX_BANK_IMAGES`` labelled samples
    of train, each once, among whose features a query's nearest neighbours are searched. The selection depends on the
    seed and the sample ids only.
    Raises: ConfigError if holdout or fold is empty by configuration; DataError if a class has too few samples (with
    data.balance: none) or samples have no label.
    """
    counts = dataset.samples_per_shard(split)
    if subset == "bank":
        train = select_subset(dataset, cfg, split=split, subset="train", seed=seed)
        return _sample_bank(train, dataset.labels(split), counts, derive_key(seed, "bank"))
    if subset == "holdout" and not cfg.holdout_per_class:
        raise ConfigError("data.holdout_per_class=0 leaves no holdout to evaluate on: set it, or use another part")
    if subset == "fold" and cfg.fold is None:
        raise ConfigError("data.fold=null leaves no fold to evaluate on: set it, or use another part")
    samples_classes = cfg.samples_per_class is not None or cfg.holdout_per_class > 0
    is_balanced = cfg.balance > 0 and subset == "train"
    if subset == "all" or not (samples_classes or is_balanced or cfg.fold is not None):
        return SplitSubset(counts, None)
    labels = dataset.labels(split)
    if labels.min() < 0:
        raise DataError(
            f"{dataset.folder}: {int((labels < 0).sum())} samples of split '{split}' have no label; "
            f"data.samples_per_class, data.holdout_per_class, data.balance and data.fold need one for each"
        )
    if is_balanced or cfg.fold is not None:
        _require_all_classes(dataset, labels, split, "data.balance" if cfg.fold is None else "data.fold")
    chosen_ids = np.arange(len(labels))
    if cfg.fold is not None:
        in_fold = _assign_folds(dataset, labels, cfg.fold.of, derive_key(seed, "folds")) == cfg.fold.number
        chosen_ids = chosen_ids[in_fold if subset == "fold" else ~in_fold]
    if samples_classes and subset != "fold":
        chosen_ids = _sample_per_class(dataset, cfg, labels, chosen_ids, subset, derive_key(seed, "per_class"))
    copy_numbers, max_copies = None, 1
    if is_balanced:
        copies = _count_copies(labels[chosen_ids], chosen_ids, cfg.balance, derive_key(seed, "balance"))
        copy_numbers = np.concatenate([np.arange(number) for number in copies])
        chosen_ids, max_copies = np.repeat(chosen_ids, copies), int(copies.max())
    return SplitSubset(_count_per_shard(chosen_ids, counts), chosen_ids, copy_numbers, max_copies)


def _count_per_shard(sample_ids: np.ndarray, samples_per_shard: np.ndarray) -> np.ndarray:
    """Return how many of the ids lie in each shard, int64 [S]."""
    per_shard, _ = np.histogram(sample_ids, bins=np.concatenate([[0], np.cumsum(samples_per_shard)]))
    return per_shard.astype(np.int64)


def _sample_bank(train: SplitSubset, labels: np.ndarray, samples_per_shard: np.ndarray, key: int) -> SplitSubset:
    """Return at most ``MAX_BANK_IMAGES`` distinct labelled samples of the training subset."""
    ids = np.unique(train.to_split_positions(np.arange(len(train))))
    ids = ids[labels[ids] >= 0]
    ids = np.sort(ids[np.argsort(hash_ids(key, ids), kind="stable")[:MAX_BANK_IMAGES]])
    return SplitSubset(_count_per_shard(ids, samples_per_shard), ids)


def _require_all_classes(dataset: Dataset, labels: np.ndarray, split: str, setting: str) -> None:
    """Raise DataError if a class of the data set has no sample in the split."""
    names = dataset.classes or ()
    for name, samples in zip(names, np.bincount(labels, minlength=len(names)), strict=False):
        if not samples:
            raise DataError(
                f"{dataset.folder}: class '{name}' has no sample in split '{split}', and {setting} needs some of each"
            )


def _count_copies(labels: np.ndarray, ids: np.ndarray, balance: float, key: int) -> np.ndarray:
    """Return every sample's copies per epoch, int64 [n].

    A class of n samples gets n (largest / n) ** balance copies in total, rounded.
    """
    copies = np.empty(len(ids), dtype=np.int64)
    counts = np.bincount(labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        total = round(len(members) * float(counts.max() / len(members)) ** balance)
        copies_of_all, remainder = divmod(total, len(members))
        copies[members] = copies_of_all
        copies[members[np.argsort(hash_ids(key, ids[members]), kind="stable")[:remainder]]] += 1
    return copies


def _assign_folds(dataset: Dataset, labels: np.ndarray, num_folds: int, key: int) -> np.ndarray:
    """Return the fold of every sample, int64 [N], in [0, num_folds).

    Samples are sorted by class, shuffled within each class, and assigned round-robin over the complete sequence: the
    folds' sizes, in total and per class, differ by at most one sample.
    Raises: DataError if a class has fewer samples than folds.
    """
    for label, samples in zip(*np.unique(labels, return_counts=True), strict=True):
        if samples < num_folds:
            name = f" ('{dataset.classes[label]}')" if dataset.classes and label < len(dataset.classes) else ""
            raise DataError(
                f"{dataset.folder}: class {label}{name} has {samples} samples, too few for {num_folds} folds that each "
                f"hold some of it: make fewer folds"
            )
    shuffled = np.lexsort((hash_ids(key, np.arange(len(labels))), labels))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[shuffled] = np.arange(len(labels)) % num_folds
    return folds


def _sample_per_class(
    dataset: Dataset, cfg: DataConfig, labels: np.ndarray, candidates: np.ndarray, subset: SubsetName, key: int
) -> np.ndarray:
    """Return the train or holdout subset of the sample ids ``candidates``, ascending."""
    num_train, candidate_labels = cfg.samples_per_class or 0, labels[candidates]
    chosen_ids = []
    for label in np.unique(labels):
        members = candidates[candidate_labels == label]
        needed = num_train + cfg.holdout_per_class
        if len(members) < needed or (cfg.samples_per_class is None and len(members) == needed):
            outside = "" if cfg.fold is None else f" outside fold {cfg.fold.number} of {cfg.fold.of}"
            smallest = int(np.unique(candidate_labels, return_counts=True)[1].min())
            raise DataError(
                f"{dataset.folder}: class {int(label)} has {len(members)} samples{outside}, too few for "
                f"data.samples_per_class={num_train} and data.holdout_per_class={cfg.holdout_per_class}: "
                f"{smallest - (cfg.samples_per_class is None)} together are what every class has"
            )
        members = members[np.argsort(hash_ids(key, members), kind="stable")]
        if subset == "holdout":
            chosen_ids.append(members[num_train:needed])
        else:
            chosen_ids.append(members[: cfg.samples_per_class] if cfg.samples_per_class else members[needed:])
    return np.sort(np.concatenate(chosen_ids))
