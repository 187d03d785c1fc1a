"""The names that a run and its numbers have in MLflow. metrics.jsonl keeps the names of foveal."""

import re
from pathlib import Path

from foveal.tracking.tracker import MetricRow

# MLflow groups metrics by what stands before a slash, and shows `system/` on a page of its own.
_TRAINING, _OTHER, _SYSTEM = "train", "results", "system"
_EVALUATIONS = ("val", "holdout", "fold")
_SYSTEM_NAMES = frozenset(
    ("data_wait", "bad_samples", "slowest_rank", "slowest_data_wait", "step_applied")  # the last: 1, unless refused
)
_SYSTEM_SUFFIXES = ("_per_second", "_ms", "_seconds", "_gigabytes")
_UNSUPPORTED = re.compile(r"[^\w.\- :/]")
_BAD_IN_MODEL_NAME = re.compile(r"[^\w\- ]")
_PLAIN_FOLDERS = ("runs", "")  # above a run; their names tell no runs apart
_MAX_NAME_LENGTH = 250  # characters


def name_metric(name: str, *, of_step: bool) -> str:
    """Return MLflow's name of a logged metric: ``train/loss``, ``val/top1``, ``system/images_per_second``.

    of_step: whether the metric stands in the row of a training step. Users name the arms of a comparison, which stand
    under ``results/``; what MLflow does not take in a name becomes "_".
    """
    prefix, separator, rest = name.partition("_")
    if name in _SYSTEM_NAMES or name.endswith(_SYSTEM_SUFFIXES):
        group = _SYSTEM
    elif separator and rest and prefix in _EVALUATIONS:
        group, name = prefix, rest
    else:
        group = _TRAINING if of_step else _OTHER
    return _clean_path(f"{group}/{name}")


def name_metrics(row: MetricRow) -> dict[str, float]:
    """Return the numbers of a row, without step and time, under MLflow's names."""
    of_step = "loss" in row
    return {
        name_metric(name, of_step=of_step): float(value) for name, value in row.items() if name not in ("step", "time")
    }


def name_run(run_dir: Path, pipeline_dir: Path | None) -> str:
    """Return the name of a run: ``pipeline/stage``, or the folder's name after that of its parent.

    Both folders are absolute. A folder called ``runs`` is no name.
    """
    if pipeline_dir is not None and run_dir != pipeline_dir:
        inside = run_dir.relative_to(pipeline_dir) if run_dir.is_relative_to(pipeline_dir) else Path(run_dir.name)
        return f"{pipeline_dir.name}/{inside.as_posix()}"
    above = run_dir.parent.name
    return run_dir.name if above in _PLAIN_FOLDERS else f"{above}/{run_dir.name}"


def name_model(run_name: str, export: str) -> str:
    """Return the name of an export's model. export: its folder in the run, ``export`` or ``export/student``."""
    parts = [run_name, *Path(export).parts[1:]]
    return _BAD_IN_MODEL_NAME.sub("_", "-".join(parts).replace("/", "-"))[:_MAX_NAME_LENGTH]


def _clean_path(name: str) -> str:
    """Return a metric's name as MLflow takes it: a relative path without "." and ".." as parts."""
    parts = [part if part.strip(".") else "_" for part in _UNSUPPORTED.sub("_", name).split("/")]
    return "/".join(parts)[:_MAX_NAME_LENGTH]
