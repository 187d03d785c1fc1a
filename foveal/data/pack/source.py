"""Data set of a source as the writer reads it: samples by number, their order, their labels."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveal.data.indexing.tar import MAX_CLASSES
from foveal.errors import DataError
from foveal.seeding import derive_key, hash_ids

SPLIT_KEY = derive_key(0, "split")  # the split into training and validation does not depend on a run's seed
_MAX_STEM_LENGTH = 80  # a plain tar header holds names of 100 bytes
_MAX_SPLIT_LENGTH = 40

PixelStats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, pixels in [0, 1]


@dataclass(frozen=True)
class PackSample:
    """An image to be read. field: the member's name, such as jpg, or None: from the header; label -1: no label."""

    key: str
    field: str | None
    label: int
    read_bytes: Callable[[], bytes]
    location: str


@dataclass(frozen=True)
class PackSplit:
    """A split: the numbers of its samples in shard order, and the function from a number to its sample."""

    sample_numbers: np.ndarray
    get_sample: Callable[[int], PackSample]


@dataclass(frozen=True)
class PackDataset:
    """A data set to be written. pixel_stats None: the writer estimates mean and std."""

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, PackSplit]
    pixel_stats: PixelStats | None = None


def make_webdataset_key(number: int, name: str) -> str:
    """Return a key that is unique in its split and contains the file's stem."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_MAX_STEM_LENGTH]  # a dot would end the key
    return f"{number:08d}_{stem}"


def hashed_order(count: int) -> np.ndarray:
    """Return range(count) in hashed order, which mixes the classes in every shard: int64 [count]."""
    return np.argsort(hash_ids(SPLIT_KEY, np.arange(count, dtype=np.int64)), kind="stable")


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
    Raises: DataError if a name cannot be part of a file name.
    """
    if split_names is None:
        train, val = split_train_val(labels, lambda counts: np.rint(val_fraction * counts).astype(np.int64))
        return {
            name: PackSplit(numbers, get_sample) for name, numbers in (("train", train), ("val", val)) if len(numbers)
        }
    source_names = set(split_names)
    normalized = {name: _normalize_split_name(name, source_names) for name in source_names}
    names = np.array([normalized[name] for name in split_names])
    order = hashed_order(len(labels))
    sorted_names = sorted(normalized.values(), key=lambda name: ({"train": 0, "val": 1}.get(name, 2), name))
    return {name: PackSplit(order[names[order] == name], get_sample) for name in sorted_names}


def _normalize_split_name(name: str, names: set[str]) -> str:
    """Return foveal's name of a split: 'val' for 'validation'."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_MAX_SPLIT_LENGTH - 1}}}", name):
        raise DataError(
            f"'{name[:_MAX_SPLIT_LENGTH]}' cannot name a split: file names of shards contain it, use letters and digits"
        )
    return "val" if name == "validation" and "val" not in names else name


def parse_labels(values: Sequence[Any], location: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return labels int64 [n] (-1: no label) and the class names of a column.

    If all cells are integers, they are the labels; -1 and an empty cell mean no label. Otherwise every cell is a class
    name, and the label is its position among the sorted names.
    Raises: DataError for labels out of range; the message begins with ``location``.
    """
    texts = [_cell_text(value) for value in values]
    distinct = {text for text in texts if text is not None}
    if not distinct:
        return np.full(len(texts), -1, dtype=np.int64), None
    if all(re.fullmatch(r"-?\d{1,18}", text) for text in distinct):
        labels = np.array([-1 if text is None else int(text) for text in texts], dtype=np.int64)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < -1 or highest >= MAX_CLASSES:
            raise DataError(
                f"{location}: labels from {lowest} to {highest}, and labels are 0 to {MAX_CLASSES - 1}, "
                f"or -1 for none: number the classes from 0, or give their names"
            )
        return labels, tuple(str(label) for label in range(highest + 1)) or None
    names = sorted(distinct)
    label_of = {name: label for label, name in enumerate(names)}
    return np.array([-1 if text is None else label_of[text] for text in texts], dtype=np.int64), tuple(names)


def _cell_text(value: Any) -> str | None:
    """Return the text of a cell, or None if it is empty. Integers stored as floats (columns with gaps) are integers."""
    if isinstance(value, float):
        if value != value:  # noqa: PLR0124 - NaN, which some libraries write for a missing value
            return None
        if value.is_integer():
            value = int(value)
    return None if value is None else str(value).strip() or None
