"""What a source is to the writer: samples by number, their order, their labels."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveal.data.indexing.tar import MAX_CLASSES
from foveal.errors import DataError
from foveal.seeding import derive_key, hash_ids

SPLIT_KEY = derive_key(0, "split")  # one division into training and validation for everybody, whatever the run's seed
_LONGEST_STEM = 80  # a tar's plain header holds names of 100 bytes
_LONGEST_SPLIT = 40

PixelStats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, pixels in [0, 1]


@dataclass(frozen=True)
class PackSample:
    """An image still to be read. field: its kind, such as jpg, or None: as its bytes say; label -1: none."""

    key: str
    field: str | None
    label: int
    read_bytes: Callable[[], bytes]
    location: str


@dataclass(frozen=True)
class PackSplit:
    """A split: the numbers of its samples in the order of the shards, and what lies under a number."""

    sample_numbers: np.ndarray
    get_sample: Callable[[int], PackSample]


@dataclass(frozen=True)
class PackDataset:
    """A data set still to be written. statistics: if they are known, else they are estimated."""

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, PackSplit]
    pixel_stats: PixelStats | None = None


def make_webdataset_key(number: int, name: str) -> str:
    """A key that is unique in its split and still says which file it was."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_LONGEST_STEM]  # a dot would end the key
    return f"{number:08d}_{stem}"


def hashed_order(count: int) -> np.ndarray:
    """range(count) in hashed order, so that every shard mixes the classes: int64 [count]."""
    return np.argsort(hash_ids(SPLIT_KEY, np.arange(count, dtype=np.int64)), kind="stable")


def split_train_val(labels: np.ndarray, count_val: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers for training and for validation, each in hashed order.

    labels: int64 [n]; held: from the number of samples of every label (ascending) to how many of them are held out.
    """
    order = hashed_order(len(labels))
    _, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_label = order[np.argsort(rows[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the samples of its label
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_label] = place < np.repeat(count_val(counts), counts)
    return order[~is_val[order]], order[is_val[order]]


def build_splits(
    split_names: Sequence[str] | None, labels: np.ndarray, val_fraction: float, get_sample: Callable[[int], PackSample]
) -> dict[str, PackSplit]:
    """Samples by split, training first, in hashed order.

    splits: the split of each sample; None: ``val_fraction`` of every label is held out as 'val'.
    """
    if split_names is None:
        train, val = split_train_val(labels, lambda counts: np.rint(val_fraction * counts).astype(np.int64))
        return {
            name: PackSplit(numbers, get_sample) for name, numbers in (("train", train), ("val", val)) if len(numbers)
        }
    given = set(split_names)
    called = {name: _normalize_split_name(name, given) for name in given}
    names = np.array([called[name] for name in split_names])
    order = hashed_order(len(labels))
    found = sorted(called.values(), key=lambda name: ({"train": 0, "val": 1}.get(name, 2), name))
    return {name: PackSplit(order[names[order] == name], get_sample) for name in found}


def _normalize_split_name(name: str, names: set[str]) -> str:
    """A split by the name that it has here: 'val' for what others call 'validation'."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_LONGEST_SPLIT - 1}}}", name):
        raise DataError(
            f"'{name[:_LONGEST_SPLIT]}' cannot name a split, shards are called after it: take letters and digits"
        )
    return "val" if name == "validation" and "val" not in names else name


def parse_labels(values: Sequence[Any], location: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels int64 [n] (-1: none) and the names of the classes, from what stands in a column.

    Whole numbers are labels as they are, -1 and an empty place are no label; anything else names a class, and the
    names are sorted. Raises: DataError, one sentence that begins with ``what``.
    """
    plain = [_cell_text(value) for value in values]
    known = {value for value in plain if value is not None}
    if not known:
        return np.full(len(plain), -1, dtype=np.int64), None
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in known):
        labels = np.array([-1 if value is None else int(value) for value in plain], dtype=np.int64)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < -1 or highest >= MAX_CLASSES:
            raise DataError(
                f"{location}: labels from {lowest} to {highest}, and labels are 0 to {MAX_CLASSES - 1}, or -1 for none: "
                f"number the classes from 0, or give their names"
            )
        return labels, tuple(str(label) for label in range(highest + 1)) or None
    names = sorted(known)
    rows = {name: row for row, name in enumerate(names)}
    return np.array([-1 if value is None else rows[value] for value in plain], dtype=np.int64), tuple(names)


def _cell_text(value: Any) -> str | None:
    """The text of a cell; None if it is empty. Whole numbers stored as floats, because some are missing, are whole."""
    if isinstance(value, float):
        if value != value:  # noqa: PLR0124 - not a number, as some libraries write what is missing
            return None
        if value.is_integer():
            value = int(value)
    return None if value is None else str(value).strip() or None
