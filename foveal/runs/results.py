"""Which logged numbers say how good a model is."""

from typing import Any

# Numbers of a training step that are no results.
_STEP_METRICS = ("step", "lr", "grad_norm", "data_wait", "bad_samples", "slowest_rank", "slowest_data_wait")
_STEP_METRIC_SUFFIXES = ("_per_second", "_ms", "_seconds", "_gigabytes", "_applied")


def is_result(name: str, value: Any) -> bool:
    """Whether a logged number says how good a model is, and not how a step went."""
    return isinstance(value, float) and name not in _STEP_METRICS and not name.endswith(_STEP_METRIC_SUFFIXES)
