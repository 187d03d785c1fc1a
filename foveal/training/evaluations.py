"""The evaluations of a run so far, and which of them is the best: pure functions of what a checkpoint holds."""

import math

Scores = dict[int, dict[str, float]]  # step to the numbers of its evaluation, by the names that they are logged under


def higher_is_better(metric: str) -> bool:
    """Of a loss less is better, of everything else more."""
    return not metric.endswith("loss")


def until(scores: Scores, step: int) -> Scores:
    """The evaluations up to a step, that one included."""
    return {at: numbers for at, numbers in scores.items() if at <= step}


def values(scores: Scores, metric: str) -> list[float]:
    """A metric in the order of the steps."""
    return [scores[step][metric] for step in sorted(scores)]


def best_step(scores: Scores, metric: str) -> int:
    """The step of the best evaluation, the first of equals; one that is not a number is the worst."""
    signed = {step: _signed(scores[step][metric], metric) for step in sorted(scores)}
    return max(signed, key=signed.__getitem__)


def is_over(scores: Scores, metric: str, patience: int) -> bool:
    """Whether so many evaluations have come after the best one."""
    return bool(scores) and sum(step > best_step(scores, metric) for step in scores) >= patience


def _signed(value: float, metric: str) -> float:
    if math.isnan(value):
        return -math.inf
    return value if higher_is_better(metric) else -value
