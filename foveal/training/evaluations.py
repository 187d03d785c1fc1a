"""The evaluations of a run so far, and which of them is the best: pure functions of what a checkpoint holds."""

import math

Evaluations = dict[
    int, dict[str, float]
]  # step to the numbers of its evaluation, by the names that they are logged under


def higher_is_better(metric: str) -> bool:
    """Of a loss less is better, of everything else more."""
    return not metric.endswith("loss")


def filter_up_to_step(evaluations: Evaluations, step: int) -> Evaluations:
    """The evaluations up to a step, that one included."""
    return {at: numbers for at, numbers in evaluations.items() if at <= step}


def collect_metric_values(evaluations: Evaluations, metric: str) -> list[float]:
    """A metric in the order of the steps."""
    return [evaluations[step][metric] for step in sorted(evaluations)]


def find_best_step(evaluations: Evaluations, metric: str) -> int:
    """The step of the best evaluation, the first of equals; one that is not a number is the worst."""
    signed = {step: _sort_key(evaluations[step][metric], metric) for step in sorted(evaluations)}
    return max(signed, key=signed.__getitem__)


def is_patience_exhausted(evaluations: Evaluations, metric: str, patience: int) -> bool:
    """Whether so many evaluations have come after the best one."""
    return bool(evaluations) and sum(step > find_best_step(evaluations, metric) for step in evaluations) >= patience


def _sort_key(value: float, metric: str) -> float:
    if math.isnan(value):
        return -math.inf
    return value if higher_is_better(metric) else -value
