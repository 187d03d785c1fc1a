"""What the newest rows of a metrics.jsonl say about a run: where it is, how fast, and whether the loss falls."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveal.runs.results import is_result

_PACE_SECONDS = 600.0  # the pace is that of the last ten minutes: it contains evaluations and saves
_MAX_AVERAGED_STEPS = 100  # in each of the two means of the loss
_MIN_AVERAGED_STEPS = 5


@dataclass(frozen=True)
class LossTrend:
    """The mean loss of the newest ``num_steps`` steps, and of as many before them. Steps without a finite loss count for nothing."""

    mean: float
    mean_before: float
    num_steps: int


@dataclass(frozen=True)
class RecentRows:
    """What the newest rows say; None where they do not. Times are unix seconds, ``data_wait`` is in [0, 1].

    ``evaluations``: the logged results by step, of the evaluations among the rows. ``longest_gap_seconds``: between two
    writes of rows. ``training_names``: what the newest step logged.
    """

    step: int | None = None
    written_at: float | None = None
    loss: float | None = None
    trend: LossTrend | None = None
    lr: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds_per_step: float | None = None
    longest_gap_seconds: float | None = None
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    training_names: frozenset[str] = frozenset()


def summarize_rows(newest_first: Iterable[Mapping[str, Any]], attempt_started_at: float = 0.0) -> RecentRows:
    """Summarise rows; the pace is that of the rows since ``attempt_started_at`` (unix seconds)."""
    rows = list(newest_first)
    training = [row for row in rows if "loss" in row]
    newest = training[0] if training else {}
    writes = _collect_writes(rows, attempt_started_at)
    return RecentRows(
        step=int(newest["step"]) if training else None,
        written_at=_number(rows[0].get("time")) if rows else None,
        loss=_number(newest.get("loss")),
        trend=_measure_trend([row["loss"] for row in training]),
        lr=_number(newest.get("lr")),
        images_per_second=_newest_number(training, "images_per_second"),
        data_wait=_newest_number(training, "data_wait"),
        seconds_per_step=_measure_pace(writes),
        longest_gap_seconds=max(
            (after - before for (after, _), (before, _) in itertools.pairwise(writes)), default=None
        ),
        evaluations=_collect_evaluations(rows),
        training_names=frozenset(newest),
    )


def _collect_writes(rows: Sequence[Mapping[str, Any]], since: float) -> list[tuple[float, int]]:
    """Return (time, highest step) of each write of rows of steps, newest first. The rows of a write have one time."""
    writes: dict[float, int] = {}
    for row in rows:
        time = _number(row.get("time"))
        if "loss" in row and time is not None and time >= since:
            writes[time] = max(writes.get(time, 0), int(row["step"]))
    return sorted(writes.items(), reverse=True)


def _measure_pace(writes: Sequence[tuple[float, int]]) -> float | None:
    """Return seconds per step over the writes of the last ten minutes, over two of them at least."""
    if len(writes) < 2:
        return None
    last_time, last_step = writes[0]
    recent = [write for write in writes if write[0] >= last_time - _PACE_SECONDS]
    first_time, first_step = recent[-1] if len(recent) > 1 else writes[1]
    return (last_time - first_time) / (last_step - first_step) if last_step > first_step else None


def _measure_trend(newest_first: Sequence[float]) -> LossTrend | None:
    num_steps = min(len(newest_first) // 2, _MAX_AVERAGED_STEPS)
    if num_steps < _MIN_AVERAGED_STEPS:
        return None
    means = [_finite_mean(part) for part in (newest_first[:num_steps], newest_first[num_steps : 2 * num_steps])]
    return None if means[0] is None or means[1] is None else LossTrend(means[0], means[1], num_steps)


def _finite_mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if _number(value) is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _collect_evaluations(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the results of evaluations by step, oldest first; several rows of a step are one evaluation."""
    evaluations: dict[int, dict[str, float]] = {}
    for row in reversed([row for row in rows if "loss" not in row]):
        results = {name: value for name, value in row.items() if name != "time" and is_result(name, value)}
        if results:
            evaluations.setdefault(int(row["step"]), {}).update(results)
    return evaluations


def _newest_number(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((number for row in rows if (number := _number(row.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
