"""Data set of a source as the writer reads it: samples by number, their order, their labels."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foveal.data.format.class_counts import describe_empty_classes, list_some
from foveal.data.pack.label_member import ImageSize, LabelMember
from foveal.data.pack.split_names import SPLIT_ORDER, fold_case, normalize_split_names, split_rank
from foveal.seeding import derive_key, hash_ids

SPLIT_KEY = derive_key(0, "split")  # the split into training and validation does not depend on a run's seed
_MAX_NAMED = 5  # class names in a note
_MAX_STEM_LENGTH = 80  # a plain tar header holds names of 100 bytes

SampleLabel = int | tuple[int, ...]  # the class (-1: no label), or several classes
PixelStats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, pixels in [0, 1]


@dataclass(frozen=True)
class PackSample:
    """An image to be read. field: the member's name, such as jpg, or None: from the header.

    read_label: returns the bytes of the label member from the image's size, if the data set has such members.
    """

    key: str
    field: str | None
    label: SampleLabel
    read_bytes: Callable[[], bytes]
    location: str
    read_label: Callable[[ImageSize], bytes] | None = None


@dataclass(frozen=True)
class PackSplit:
    """A split: the numbers of its samples in shard order, their labels, and the function from a number to its sample.

    labels: int64, one per entry of ``sample_numbers``. source_name: the source's name of the split, if it has one.
    """

    sample_numbers: np.ndarray
    labels: np.ndarray
    get_sample: Callable[[int], PackSample]
    source_name: str | None = None


@dataclass(frozen=True)
class PackDataset:
    """A data set to be written. pixel_stats None: the writer estimates mean and std.

    summary: what a source of folders was taken for: images, labels, splits, what was passed over, in this order. notes:
    what else a reader should know, in sentences. listing: a digest of what the source lists beside labels, such
    as the names and sizes of files. multilabel: samples have lists of classes, and the labels of splits are -1.
    label_member: the member that holds the labels, if they are no classes of images; the labels of splits are -1.
    """

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, PackSplit]
    pixel_stats: PixelStats | None = None
    summary: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    listing: str | None = None
    multilabel: bool = False
    label_member: LabelMember | None = None


def make_webdataset_key(number: int, name: str) -> str:
    """Return a key that is unique in its split and contains the file's stem."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_MAX_STEM_LENGTH]  # a dot would end the key
    return f"{number:08d}_{stem}"


def hashed_order(count: int) -> np.ndarray:
    """Return range(count) in hashed order, which mixes the classes in every shard: int64 [count]."""
    return np.argsort(hash_ids(SPLIT_KEY, np.arange(count, dtype=np.int64)), kind="stable")


def spread_numbers(split: PackSplit, limit: int) -> list[int]:
    """Return the numbers of at most ``limit`` samples, spread evenly over a split."""
    count = len(split.sample_numbers)
    positions = np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))
    return split.sample_numbers[positions].tolist()


def split_train_val(labels: np.ndarray, count_val: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample numbers for training and for validation, each in hashed order.

    labels: int64 [n]. count_val: from the samples per label (labels ascending) to the validation samples per label.
    """
    order = hashed_order(len(labels))
    _, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_label = order[np.argsort(rows[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # among the samples of its label
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_label] = rank < np.repeat(count_val(counts), counts)
    return order[~is_val[order]], order[is_val[order]]


def build_splits(
    split_names: Sequence[str] | None, labels: np.ndarray, val_fraction: float, get_sample: Callable[[int], PackSample]
) -> dict[str, PackSplit]:
    """Return the splits, training first, with their samples in hashed order.

    split_names: the split of each sample; None: ``val_fraction`` of every label is held out as 'val'.
    Raises: DataError if a name cannot be part of a file name, or two names mean one split.
    """
    if split_names is None:
        train, val = split_train_val(labels, lambda counts: np.rint(val_fraction * counts).astype(np.int64))
        return {
            name: PackSplit(numbers, labels[numbers], get_sample)
            for name, numbers in (("train", train), ("val", val))
            if len(numbers)
        }
    normalized = normalize_split_names(split_names)
    names = np.array([normalized[name] for name in split_names])
    order = hashed_order(len(labels))
    pack_splits: dict[str, PackSplit] = {}
    for source_name, name in sorted(normalized.items(), key=lambda pair: split_rank(pair[1])):
        numbers = order[names[order] == name]
        pack_splits[name] = PackSplit(numbers, labels[numbers], get_sample, source_name)
    return pack_splits


def describe_dataset(dataset: PackDataset) -> tuple[str, ...]:
    """Return what a reader of a source should know about it: renamed splits, missing labels, doubtful class names."""
    notes = [
        f"split '{name}' is '{split.source_name}' of the source"
        for name, split in dataset.splits.items()
        if split.source_name not in (None, name)
    ]
    notes += _describe_split_names(dataset.splits)
    if dataset.classes is None or dataset.label_member is not None:
        return (*notes, *dataset.notes)
    notes += [] if dataset.multilabel else _describe_labels(dataset.classes, dataset.splits)
    spellings: dict[str, list[str]] = {}
    for name in dataset.classes:
        spellings.setdefault(fold_case(name), []).append(name)
    if doubtful := [" and ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]:
        more = f", and {len(doubtful) - _MAX_NAMED:,} more" if doubtful[_MAX_NAMED:] else ""
        notes.append(f"class names that differ in case only are kept apart: {', '.join(doubtful[:_MAX_NAMED])}{more}")
    if len(dataset.classes) == 1:
        notes.append(f"there is one class only, {dataset.classes[0]!r}: enough for pretraining, not for classification")
    return (*notes, *dataset.notes)


def _describe_split_names(splits: dict[str, PackSplit]) -> list[str]:
    """Return a note if the source's own names of splits leave out those that training reads without a setting."""
    names = list_some(list(splits))
    if "train" not in splits:
        return [f"no split is named 'train': set data.train and data.val to splits of {names}"]
    if "val" not in splits and not splits.keys() <= set(SPLIT_ORDER):
        return [f"no split is named 'val': data.val sets the split to evaluate, of {names}"]
    return []


def _describe_labels(classes: tuple[str, ...], splits: dict[str, PackSplit]) -> list[str]:
    """Return notes on images without label and on classes without images, in all and in single splits."""
    counts = {
        name: np.bincount(split.labels[split.labels >= 0], minlength=len(classes)) for name, split in splits.items()
    }
    total = np.sum(list(counts.values()), axis=0)
    notes = [sentence] if (sentence := describe_empty_classes(total, classes)) else []
    for name, split in splits.items():
        if num_unlabelled := int((split.labels < 0).sum()):
            notes.append(f"split '{name}': {num_unlabelled:,} of {len(split.labels):,} images have no label")
        missing = np.flatnonzero((counts[name] == 0) & (total > 0))
        if len(missing) and num_unlabelled < len(split.labels):
            names = list_some([classes[label] for label in missing])
            notes.append(f"split '{name}' has no image of {len(missing):,} of {len(classes):,} classes ({names})")
    return notes
