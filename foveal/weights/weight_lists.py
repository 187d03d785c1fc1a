"""Lists of weights in sentences: the first five by name and shape, and the number of the others."""

from collections.abc import Mapping, Sequence

from torch import Tensor

_MAX_LISTED = 5


def list_weights(weights: Mapping[str, Tensor]) -> str:
    """Return names with shapes: ``norm.weight [8], norm.bias [8] and 12 more``."""
    return list_first([f"{name} {list(value.shape)}" for name, value in weights.items()])


def list_first(entries: Sequence[str]) -> str:
    """Return the first entries, and the number of the others."""
    more = len(entries) - _MAX_LISTED
    return ", ".join(entries[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
