"""The names that a run and its numbers have in MLflow. metrics.jsonl keeps the names of foveal."""

import re
from pathlib import Path

from foveal.tracking.tracker import MetricRow

# MLflow draws the charts of what stands before a slash together, these groups in alphabetical order, what has no slash
# behind them, and shows `system/` on a page of its own. So losses come first, then the rates of updates, then evaluations.
_LOSSES, _UPDATES, _EVALUATIONS, _SYSTEM = "train", "update", "val", "system"
_UPDATE_NAMES = frozenset(("lr", "grad_norm"))
_SYSTEM_NAMES = frozenset(("data_wait", "bad_samples", "slowest_rank", "slowest_data_wait", "step_applied"))
_SYSTEM_SUFFIXES = ("_per_second", "_ms", "_seconds", "_gigabytes")
_EVALUATED = re.compile(r"(val|holdout|fold)_(.+)", re.DOTALL)
# The values that say that nothing happened: a chart of them would be a line.
_UNEVENTFUL = {"step_applied": 1.0, "bad_samples": 0.0}
_UNSUPPORTED = re.compile(r"[^\w.\- :/]")
_BAD_IN_MODEL_NAME = re.compile(r"[^\w\- ]")
_PLAIN_FOLDERS = ("runs", "")  # above a run; their names tell no runs apart
_MAX_NAME_LENGTH = 250  # characters


def name_metric(name: str, *, of_step: bool) -> str:
    """Return MLflow's name of a logged metric: ``train/loss``, ``update/lr``, ``val/top1``, ``system/images_per_second``.

    of_step: whether the metric stands in the row of a training step. ``holdout_top1`` is ``val/holdout/top1``, and
    ``val_small/top1`` of a student is ``val/small/top1``. Users name the arms of a comparison, whose results have no
    group; what MLflow does not take in a name becomes "_".
    """
    if name == "step_applied":
        return f"{_SYSTEM}/step_refused"
    if name in _SYSTEM_NAMES or name.endswith(_SYSTEM_SUFFIXES):
        group = _SYSTEM
    elif evaluated := _EVALUATED.fullmatch(name):
        subset, name = evaluated.groups()
        group = _EVALUATIONS if subset == "val" else f"{_EVALUATIONS}/{subset}"
    elif of_step:
        group = _UPDATES if name in _UPDATE_NAMES else _LOSSES
        name = name.removeprefix(f"{_LOSSES}_") or name
    else:
        group = ""
    return _clean_path(f"{group}/{name}" if group else name)


def name_metrics(row: MetricRow) -> dict[str, float]:
    """Return the numbers of a row, without step and time, under MLflow's names.

    A number that says that nothing happened is left out: an update that was applied, no bad sample. A refused update is
    ``system/step_refused`` 1.
    """
    of_step = "loss" in row
    return {
        name_metric(name, of_step=of_step): 1.0 - float(value) if name == "step_applied" else float(value)
        for name, value in row.items()
        if name not in ("step", "time") and _UNEVENTFUL.get(name) != value
    }


def is_evaluation(mlflow_name: str) -> bool:
    """Whether a metric is measured on the images of evaluation; held-out images are of the training's split."""
    return mlflow_name.startswith(f"{_EVALUATIONS}/") and not mlflow_name.startswith(f"{_EVALUATIONS}/holdout/")


def name_stage_result(stage: str, name: str) -> str:
    """Return the name of a stage's result in the run of its pipeline, ``pretrain.val.loss``.

    Without a slash: MLflow would draw a bar of every stage's results before the losses.
    """
    return _clean_path(f"{stage}.{name_metric(name, of_step=False)}".replace("/", "."))


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
