"""Which logged numbers say how good a model is, and in which direction."""

import re
from typing import Any

# Numbers that are no results: of a training step, and the number of folds.
_NO_RESULTS = ("step", "lr", "grad_norm", "data_wait", "bad_samples", "slowest_rank", "slowest_data_wait", "folds")
_STEP_METRIC_SUFFIXES = ("_per_second", "_ms", "_seconds", "_gigabytes", "_applied")
_LOWER_IS_BETTER = re.compile(r"(loss|distance|error|mse)(_mean|_lowest|_highest|_std)?$")
_CHOSEN = re.compile(r"(^|_)(lr_per_256|c|k|temperature)(_layer_\d+)?$")


def is_result(name: str, value: Any) -> bool:
    """Whether a logged number says how good a model is, and not how a step went."""
    return isinstance(value, float) and name not in _NO_RESULTS and not name.endswith(_STEP_METRIC_SUFFIXES)


def is_lower_better(name: str) -> bool:
    """Whether a lower value of a logged metric is better: losses, distances and errors, and their mean over runs."""
    return _LOWER_IS_BETTER.search(name) is not None


def is_chosen(name: str) -> bool:
    """Whether a logged result is a value that was chosen for a model, such as its learning rate."""
    return _CHOSEN.search(name) is not None
