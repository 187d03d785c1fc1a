"""A run directory read from outside, while its run is under way or afterwards; nothing is written."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from foveal.atomic import read_json, write_json
from foveal.errors import AttemptSupersededError, CheckpointError, ConfigError, TrainingDivergedError
from foveal.renames import translate_metrics, translate_settings
from foveal.runs.inputs import RunInputs, read_inputs
from foveal.runs.results import is_result
from foveal.strict_yaml import read_yaml
from foveal.tracking.nested import NESTED_FOLDERS
from foveal.tracking.tail import read_json_or_empty, read_step_rows
from foveal.training.lease import AttemptRecord, list_attempts
from foveal.training.lineage import Fork, read_fork

EndState = Literal["saved-and-left", "failed", "diverged", "superseded"]
_PLAN, _FINISHED, _CONFIG = "plan.json", "finished.json", "config.yaml"
# Settings that one stage alone has: for a run without plan.json, one of 0.1 or one that has just begun.
_STAGE_BY_SETTING = {"method": "distill", "freeze_encoder": "finetune", "mask_ratio": "pretrain"}
STAGES = ("pretrain", "distill", "finetune")


@dataclass(frozen=True)
class PlannedRun:
    """What a plan knows and settings do not say. lines: the plan as text. num_runs: nested runs; 1 for a training."""

    stage: str
    total_steps: int
    stop_step: int
    steps_per_epoch: int
    world_size: int
    num_runs: int
    lines: tuple[str, ...] = ()


def write_plan(run_dir: Path, plan: PlannedRun) -> None:
    """Record the plan of the newest attempt in the run directory."""
    write_json(run_dir / _PLAN, {**plan.__dict__, "lines": list(plan.lines)})


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. Files that a run of an older version does not have are empty or None."""

    path: Path
    plan: PlannedRun | None
    settings: Mapping[str, Any]  # by dotted name, under the names of today
    tags: Mapping[str, str]
    attempts: tuple[AttemptRecord, ...]
    finished: Mapping[str, Any] = field(default_factory=dict)  # of finished.json

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def stage(self) -> str:
        """The stage; "" for a run of a version that did not record it and settings that tell none."""
        if self.plan is not None:
            return self.plan.stage
        return next((stage for setting, stage in _STAGE_BY_SETTING.items() if setting in self.settings), "")

    @property
    def pipeline(self) -> Path | None:
        """The directory of the run's pipeline, relative to where it was started, as the setting says."""
        folder = self.settings.get("run.pipeline")
        return Path(folder) if folder else None

    @property
    def reason(self) -> str:
        """Why the newest attempt ended; "" while it is under way."""
        return (self.attempts[-1].reason or "") if self.attempts else ""

    @cached_property
    def results(self) -> dict[str, float]:
        """The results of a finished run, else those of the newest evaluation, by logged name."""
        summary = translate_metrics(self.finished.get("summary", {}))
        if not summary:
            evaluations = [row for row in self.rows() if "loss" not in row]
            summary = evaluations[-1] if evaluations else {}
        return {name: value for name, value in summary.items() if is_result(name, value)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl: of steps, which have a ``loss``, and of evaluations. Raises: CheckpointError."""
        return read_step_rows(self.path / "metrics.jsonl")

    @cached_property
    def inputs(self) -> RunInputs | None:
        """What the run was made from; None if its version recorded none. Raises: CheckpointError."""
        return read_inputs(self.path)

    @cached_property
    def fork(self) -> Fork | None:
        """The run's beginning in another run. Raises: CheckpointError."""
        return read_fork(self.path)

    @cached_property
    def nested(self) -> tuple[Path, ...]:
        """The directories of the trials or folds."""
        return tuple(sorted(file.parent for name in NESTED_FOLDERS for file in self.path.glob(f"{name}/*/{_CONFIG}")))

    @property
    def exports(self) -> tuple[Path, ...]:
        """The folders of the exports."""
        return tuple(sorted(card.parent for card in (self.path / "export").rglob("card.json")))

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The pictures, by name and step."""
        return tuple(sorted((self.path / "pictures").glob("*.png")))


def state_after_end(exit_code: int) -> EndState:
    """Return the state of an attempt that recorded its end and has not finished the run.

    The tags may be those of an earlier attempt: one that is refused, or hangs, does not write them.
    """
    states: dict[int, EndState] = {
        0: "saved-and-left",
        TrainingDivergedError.exit_code: "diverged",
        AttemptSupersededError.exit_code: "superseded",
    }
    return states.get(exit_code, "failed")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory in which an attempt has begun; one that may not be entered is none."""
    try:
        return (folder / _CONFIG).exists() and (folder / "science.json").exists()
    except OSError:
        return False


def read_run(folder: Path) -> RunRecord:
    """Read a run directory. Raises: CheckpointError for another folder, a damaged file, or one that cannot be read."""
    if not is_run(folder):
        raise CheckpointError(explain_no_run(folder))
    try:
        settings = _read_settings(folder / _CONFIG)
        plan = read_json_or_empty(folder / _PLAN)
        return RunRecord(
            folder,
            _parse_plan(plan, folder / _PLAN),
            settings,
            read_json_or_empty(folder / "tags.json"),
            tuple(list_attempts(folder)),
            _read_finished(folder / _FINISHED),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error})") from None


def list_runs(folder: Path) -> list[Path]:
    """Return the run directories in a folder, at any depth, in the order of their first attempts.

    The runs inside a run (trials, folds) are not listed; ``RunRecord.nested`` has them. Links are not followed.
    """
    runs: list[Path] = []
    pending = [folder]
    while pending:
        current = pending.pop()
        if is_run(current):
            runs.append(current)
            continue
        try:
            with os.scandir(current) as entries:  # which knows the kind of each without asking for it
                folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:  # a folder of somebody else
            continue
        pending += [current / name for name in folders if not name.startswith(".")]
    return sorted(runs, key=_started_at)


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = isinstance(value, dict) and value
        flat |= flatten_settings(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def _started_at(run: Path) -> tuple[float, str]:
    attempts: list[AttemptRecord] = []
    with contextlib.suppress(OSError):  # a folder of somebody else
        attempts = list_attempts(run)
    return attempts[0].started_at if attempts else 0.0, str(run)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(file)
        if isinstance(tree, dict):
            return flatten_settings(translate_settings(tree)[0])
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    raise CheckpointError(f"{file} is damaged (it holds no settings): restore it")


def _parse_plan(record: dict[str, Any], file: Path) -> PlannedRun | None:
    if not record:
        return None
    try:
        plan = PlannedRun(**{**record, "lines": tuple(record.get("lines", ()))})
    except TypeError:
        plan = None
    numbers = () if plan is None else (plan.total_steps, plan.stop_step, plan.steps_per_epoch, plan.num_runs)
    if plan is None or not isinstance(plan.stage, str) or not all(type(number) is int for number in numbers):
        raise CheckpointError(f"{file} is not as foveal wrote it: start the run again, which writes it anew")
    return plan


def _read_finished(file: Path) -> dict[str, Any]:
    record = read_json(file) if file.exists() else {}
    if not isinstance(record.get("summary", {}), dict):
        raise CheckpointError(f"{file} is not as foveal wrote it: restore it")
    return record


def name_path(path: Path, error: Exception) -> str:
    """Return an error's sentence with the path that it is about."""
    sentence = str(error)
    return sentence if str(path) in sentence else f"{path}: {sentence}"


def explain_no_run(folder: Path) -> str:
    """Return why a path is no run, with what is there instead."""
    if not folder.exists():
        return f"{folder}: no such folder; a run begins with its first start, in run.dir"
    if not folder.is_dir():
        return f"{folder} is a file; give the directory of a run (run.dir)"
    if runs := list_runs(folder):
        return f"{folder} is no run, it holds {len(runs)}: {', '.join(map(str, runs[:3]))}{' ...' * (len(runs) > 3)}"
    return f"{folder} is no run that was ever started; give the directory of a run (run.dir)"
