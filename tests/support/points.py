"""The numbers of a run, as its directory has them and as MLflow has them: (name, step) to every value there.

Both under MLflow's names, which ``foveal.tracking.mlflow_names`` gives.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from foveal.tracking.jsonl import read_rows_without_time
from foveal.tracking.mlflow_names import name_metrics
from foveal.tracking.tracker import MetricRow

if TYPE_CHECKING:  # not every test that asks a run directory waits for it
    from mlflow.tracking import MlflowClient

Numbers = dict[tuple[str, int], list[float]]
_HIGHEST = 1.7976931348623157e308  # what MLflow keeps of what is infinite


def row(step: int) -> MetricRow:
    return {"step": step, "loss": 1 / step, "lr": step / 100}


def run_id(run: Path) -> str:
    return json.loads((run / "mlflow.json").read_text())["run_id"]


def in_jsonl(run: Path) -> Numbers:
    found: Numbers = {}
    for each in read_rows_without_time(run / "metrics.jsonl"):
        for name, value in name_metrics(each).items():
            found.setdefault((name, int(each["step"])), []).append(value)
    return found


def in_mlflow(client: "MlflowClient", run: Path) -> Numbers:
    found: Numbers = {}
    for name in client.get_run(run_id(run)).data.metrics:
        for metric in client.get_metric_history(run_id(run), name):
            found.setdefault((name, metric.step), []).append(metric.value)
    return found


def without_nodes(numbers: Numbers) -> Numbers:
    """Leave out system/<metric>.<node>, which metrics.jsonl does not have."""
    return {
        place: values for place, values in numbers.items() if not (place[0].startswith("system/") and "." in place[0])
    }


def comparable(numbers: Numbers) -> dict[tuple[str, int], list[str]]:
    """With NaN equal to NaN, and infinite as MLflow keeps it."""
    return {place: [_shown(value) for value in values] for place, values in numbers.items()}


def _shown(value: float) -> str:
    return repr(math.copysign(_HIGHEST, value) if math.isinf(value) else value)
