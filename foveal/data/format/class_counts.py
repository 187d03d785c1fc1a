"""Sentences about the samples per class of a data set, which every command that reads labels prints alike."""

from collections.abc import Sequence

import numpy as np

_MAX_LISTED = 5  # names in a sentence


def describe_empty_classes(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """Return a sentence that names the classes without samples; '' if there are none.

    counts: int64 [K], samples per class.
    """
    empty = np.flatnonzero(counts == 0)
    if not len(empty) or len(empty) == len(counts):
        return ""
    if empty.tolist() == [0] and classes == tuple(str(number) for number in range(len(classes))):
        return (
            f"label 0 has no samples: labels are 1 to {len(classes) - 1}, so a model has {len(classes)} classes; "
            f"subtract 1 from every label if they are numbered from 1"
        )
    verb = "has" if len(empty) == 1 else "have"
    return f"{len(empty):,} of {len(counts):,} classes {verb} no samples: {list_some([classes[i] for i in empty])}"


def list_some(names: Sequence[str]) -> str:
    """Return the first names in quotes, and dots if there are more."""
    return ", ".join(f"'{name[:40]}'" for name in names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
