"""The evaluations of a run and the best of them: pure functions of what a checkpoint stores."""

import math

Evaluations = dict[int, dict[str, float]]  # step -> metrics of the evaluation after that step, by logged name


def higher_is_better(metric: str) -> bool:
    """Return False for losses and True for every other metric."""
    return not metric.endswith("loss")


def filter_up_to_step(evaluations: Evaluations, step: int) -> Evaluations:
    """Return the evaluations up to and including a step."""
    return {evaluated: metrics for evaluated, metrics in evaluations.items() if evaluated <= step}


def collect_metric_values(evaluations: Evaluations, metric: str) -> list[float]:
    """Return the values of a metric in ascending order of steps."""
    return [evaluations[step][metric] for step in sorted(evaluations)]


def find_best_step(evaluations: Evaluations, metric: str) -> int:
    """Return the step of the best evaluation: the first among equals; NaN is the worst."""
    sort_keys = {step: _sort_key(evaluations[step][metric], metric) for step in sorted(evaluations)}
    return max(sort_keys, key=sort_keys.__getitem__)


def is_patience_exhausted(evaluations: Evaluations, metric: str, patience: int) -> bool:
    """Return whether at least ``patience`` evaluations follow the best one."""
    return bool(evaluations) and sum(step > find_best_step(evaluations, metric) for step in evaluations) >= patience


def _sort_key(value: float, metric: str) -> float:
    if math.isnan(value):
        return -math.inf
    return value if higher_is_better(metric) else -value
