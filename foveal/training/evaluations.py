"""The evaluations of a run and the best of them: pure functions of what a checkpoint stores."""

import math
from dataclasses import dataclass

Evaluations = dict[int, dict[str, float]]  # step -> metrics of the evaluation after that step, by logged name


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of an evaluation, by which a run can be selected, and its direction."""

    name: str
    higher_is_better: bool

    def with_prefix(self, prefix: str) -> "Metric":
        """Return the metric under its logged name, such as ``val_top1`` for the prefix ``val``."""
        return Metric(f"{prefix}_{self.name}", self.higher_is_better)


def filter_up_to_step(evaluations: Evaluations, step: int) -> Evaluations:
    """Return the evaluations up to and including a step."""
    return {evaluated: metrics for evaluated, metrics in evaluations.items() if evaluated <= step}


def collect_metric_values(evaluations: Evaluations, metric: str) -> list[float]:
    """Return the values of a metric in ascending order of steps."""
    return [evaluations[step][metric] for step in sorted(evaluations)]


def find_best_step(evaluations: Evaluations, metric: Metric) -> int:
    """Return the step of the best evaluation: the first among equals; NaN is the worst."""
    sort_keys = {step: _sort_key(evaluations[step][metric.name], metric) for step in sorted(evaluations)}
    return max(sort_keys, key=sort_keys.__getitem__)


def is_patience_exhausted(evaluations: Evaluations, metric: Metric, patience: int, after_step: int = 0) -> bool:
    """Return whether at least ``patience`` evaluations follow the best one and ``after_step``, the start of a fork."""
    if not evaluations:
        return False
    since = max(find_best_step(evaluations, metric), after_step)
    return sum(step > since for step in evaluations) >= patience


def _sort_key(value: float, metric: Metric) -> float:
    if math.isnan(value):
        return -math.inf
    return value if metric.higher_is_better else -value
