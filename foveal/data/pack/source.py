"""What a source is to the writer: samples by number, their order, their labels."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveal.data.indexing.tar import MOST_CLASSES
from foveal.errors import DataError
from foveal.seeding import key, ranks_of

PLACE = key(0, "split")  # one division into training and validation for everybody, whatever the run's seed
_LONGEST_STEM = 80  # a tar's plain header holds names of 100 bytes
_LONGEST_SPLIT = 40

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, pixels in [0, 1]


@dataclass(frozen=True)
class Sample:
    """An image still to be read. field: its kind, such as jpg, or None: as its bytes say; label -1: none."""

    key: str
    field: str | None
    label: int
    read: Callable[[], bytes]
    where: str


@dataclass(frozen=True)
class Part:
    """A split: the numbers of its samples in the order of the shards, and what lies under a number."""

    numbers: np.ndarray
    sample: Callable[[int], Sample]


@dataclass(frozen=True)
class Contents:
    """A data set still to be written. statistics: if they are known, else they are estimated."""

    name: str
    classes: tuple[str, ...] | None
    parts: dict[str, Part]
    statistics: Statistics | None = None


def key_of(number: int, name: str) -> str:
    """A key that is unique in its split and still says which file it was."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_LONGEST_STEM]  # a dot would end the key
    return f"{number:08d}_{stem}"


def hashed(count: int) -> np.ndarray:
    """range(count) in hashed order, so that every shard mixes the classes: int64 [count]."""
    return np.argsort(ranks_of(PLACE, np.arange(count, dtype=np.int64)), kind="stable")


def divided(labels: np.ndarray, held: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers for training and for validation, each in hashed order.

    labels: int64 [n]; held: from the number of samples of every label (ascending) to how many of them are held out.
    """
    order = hashed(len(labels))
    _, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_label = order[np.argsort(rows[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the samples of its label
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_label] = place < np.repeat(held(counts), counts)
    return order[~is_val[order]], order[is_val[order]]


def parts_of(
    splits: Sequence[str] | None, labels: np.ndarray, val_fraction: float, sample: Callable[[int], Sample]
) -> dict[str, Part]:
    """Samples by split, training first, in hashed order.

    splits: the split of each sample; None: ``val_fraction`` of every label is held out as 'val'.
    """
    if splits is None:
        train, val = divided(labels, lambda counts: np.rint(val_fraction * counts).astype(np.int64))
        return {name: Part(numbers, sample) for name, numbers in (("train", train), ("val", val)) if len(numbers)}
    given = set(splits)
    called = {name: _split_name(name, given) for name in given}
    names = np.array([called[name] for name in splits])
    order = hashed(len(labels))
    found = sorted(called.values(), key=lambda name: ({"train": 0, "val": 1}.get(name, 2), name))
    return {name: Part(order[names[order] == name], sample) for name in found}


def _split_name(name: str, names: set[str]) -> str:
    """A split by the name that it has here: 'val' for what others call 'validation'."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_LONGEST_SPLIT - 1}}}", name):
        raise DataError(
            f"'{name[:_LONGEST_SPLIT]}' cannot name a split, shards are called after it: take letters and digits"
        )
    return "val" if name == "validation" and "val" not in names else name


def labels_of(values: Sequence[Any], what: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels int64 [n] (-1: none) and the names of the classes, from what stands in a column.

    Whole numbers are labels as they are, -1 and an empty place are no label; anything else names a class, and the
    names are sorted. Errors: DataError, one sentence that begins with ``what``.
    """
    plain = [_plain(value) for value in values]
    known = {value for value in plain if value is not None}
    if not known:
        return np.full(len(plain), -1, dtype=np.int64), None
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in known):
        labels = np.array([-1 if value is None else int(value) for value in plain], dtype=np.int64)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < -1 or highest >= MOST_CLASSES:
            raise DataError(
                f"{what}: labels from {lowest} to {highest}, and labels are 0 to {MOST_CLASSES - 1}, or -1 for none: "
                f"number the classes from 0, or give their names"
            )
        return labels, tuple(str(label) for label in range(highest + 1)) or None
    names = sorted(known)
    rows = {name: row for row, name in enumerate(names)}
    return np.array([-1 if value is None else rows[value] for value in plain], dtype=np.int64), tuple(names)


def _plain(value: Any) -> str | None:
    """The text of a cell; None if it is empty. Whole numbers stored as floats, because some are missing, are whole."""
    if isinstance(value, float):
        if value != value:  # noqa: PLR0124 - not a number, as some libraries write what is missing
            return None
        if value.is_integer():
            value = int(value)
    return None if value is None else str(value).strip() or None
