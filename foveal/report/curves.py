"""The curves of a run: metrics.jsonl read once, in bounded memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foveal.errors import CheckpointError
from foveal.report.series import Series
from foveal.runs.record import RunRecord

_MAX_METRICS = 300  # a run with a metric for each of many classes
_NO_METRICS = ("step", "time")


@dataclass
class Curves:
    """Metrics by logged name. steps: of training steps. evaluations: of evaluations. problem: why reading ended early."""

    steps: dict[str, Series] = field(default_factory=dict)
    evaluations: dict[str, Series] = field(default_factory=dict)
    last_step: int = 0
    first_time: float | None = None  # unix seconds of the first and last row
    last_time: float | None = None
    problem: str = ""

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Add a row of a step, which has a ``loss``, or of an evaluation."""
        step = int(row["step"])
        curves = self.steps if "loss" in row else self.evaluations
        for name, value in row.items():
            if name in _NO_METRICS or type(value) not in (float, int):
                continue
            series = curves.get(name)
            if series is None:
                if len(curves) >= _MAX_METRICS:
                    continue
                series = curves[name] = Series()
            series.add(step, float(value))
        self.last_step = max(self.last_step, step)
        moment = row.get("time")
        if isinstance(moment, float):
            self.first_time = moment if self.first_time is None else self.first_time
            self.last_time = moment


def read_curves(record: RunRecord) -> Curves:
    """Read the metrics of a run; a damaged row ends the reading and is named in ``problem``."""
    return collect_curves(record.rows())


def collect_curves(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Return the curves of rows, up to the first that is damaged."""
    curves = Curves()
    try:
        for row in rows:
            if "step" in row:
                curves.add_row(row)
    except (CheckpointError, OSError, ValueError, OverflowError) as error:
        curves.problem = str(error)
    return curves
