"""A checkpoint's training state beside the weights, and the check that a run may continue from it."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from foveal.atomic import read_json
from foveal.errors import CheckpointError
from foveal.renames import translate_metrics, translate_science

CHECKPOINT_FORMAT = 2
_SHAPE_SECTIONS = {"model", "decoder", "backbone"}
_NESTED_SECTIONS = {"trials", "cross_validation", "probe"}


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class TrainState:
    """The training state beside weights and moments.

    seconds: training time; updates: number of applied updates, for AdamW's bias correction; skipped: batches that no
    step takes; scores: metrics of each evaluation before this checkpoint, by step; save_seconds: duration of the
    slowest earlier save; rounding: the machine settings that change rounding noticeably, by name.
    """

    step: int
    seconds: float
    ranks: int
    engine: str
    science: dict[str, Any]
    versions: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    updates: int = 0
    save_seconds: float = 0.0
    rounding: dict[str, Any] = field(default_factory=dict)
    format: int = CHECKPOINT_FORMAT

    @property
    def saved_by(self) -> str:
        """World size and engine of the save, in words."""
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} under {self.engine}"


def read_train_state(folder: Path) -> TrainState:
    """Read the training state of a checkpoint; ``scores`` and ``rounding`` are empty in checkpoints of versions without them.

    Raises: OSError; CheckpointError for another format.
    """
    tree = read_json(folder / "state.json")
    if tree.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {tree.get('format')}; this foveal reads format {CHECKPOINT_FORMAT}"
        )
    try:
        # JSON's keys are strings.
        scores = {int(step): translate_metrics(metrics) for step, metrics in tree.pop("scores", {}).items()}
        return TrainState(**tree, scores=scores)
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}/state.json is not as foveal wrote it ({reason}); remove {folder.name}"
        ) from None


def read_rounding(folder: Path) -> dict[str, Any] | None:
    """Return the rounding settings under which a checkpoint was written; None if its state cannot be read."""
    try:
        return read_train_state(folder).rounding
    except (CheckpointError, OSError):
        return None


def check_science_unchanged(
    saved_science: dict[str, Any],
    current_science: dict[str, Any],
    run_or_checkpoint_dir: Path,
    neutral_values: Mapping[str, Any] | None = None,
) -> None:
    """Check that science settings are unchanged; ``saved_science`` may have the names of 0.1.

    ``neutral_values``: for settings that a later version added, the value that equals their absence.
    Raises: CheckpointError with every differing setting, its old and new value.
    """
    if not isinstance(saved_science, dict):
        raise CheckpointError(
            f"{run_or_checkpoint_dir} holds no settings of the run: restore its science.json and finished.json"
        )
    saved_science = translate_science(saved_science, current_science)
    absent = {name: value for name, value in (neutral_values or {}).items() if name not in saved_science}
    names = sorted(
        name
        for name in saved_science.keys() | current_science.keys()
        if saved_science.get(name) != current_science.get(name)
        and not (name in absent and absent[name] == current_science.get(name))
    )
    unknown = [name for name in names if not any(name == old or name.startswith(f"{old}.") for old in saved_science)]
    if names and unknown == names:
        listed = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        raise CheckpointError(
            f"{run_or_checkpoint_dir} was made by a foveal version without {listed}; continue with that version, or start anew "
            f"with another run.dir or run.fresh=true"
        )
    if names:
        changes = ", ".join(
            f"{name} (was {saved_science.get(name)!r}, is {current_science.get(name)!r})" for name in names
        )
        init_hint = _init_hint(run_or_checkpoint_dir) if "init" in current_science else ""
        raise CheckpointError(
            f"{run_or_checkpoint_dir} was made with other science: {changes}; set it back"
            f"{_own_config_hint(run_or_checkpoint_dir)}, or start anew with another run.dir or run.fresh=true{init_hint}"
            f"{_fork_hint(run_or_checkpoint_dir, names, current_science)}"
        )


def _own_config_hint(run_or_checkpoint_dir: Path) -> str:
    """Return where a run keeps its settings, which a shipped config may have changed since; empty without the file."""
    config = _find_run_dir(run_or_checkpoint_dir) / "config.yaml"
    return f" (as CONFIG, {config} has the run's own settings)" if config.exists() else ""


def _find_run_dir(run_or_checkpoint_dir: Path) -> Path:
    in_run = run_or_checkpoint_dir.parent.name == "checkpoints"
    return run_or_checkpoint_dir.parents[1] if in_run else run_or_checkpoint_dir


def _init_hint(run_folder: Path) -> str:
    """Return advice to start a new run from this run's export; empty without an export."""
    export = run_folder / "export"
    return f"; init={export} gives the new run the weights of this one" if (export / "card.json").exists() else ""


def _fork_hint(run_or_checkpoint_dir: Path, differing: list[str], science: dict[str, Any]) -> str:
    """Return advice to fork the run; empty where a shape differs or the run is made of nested runs."""
    sections = {name.split(".")[0] for name in differing}
    if sections & _SHAPE_SECTIONS or any(name.split(".")[0] in _NESTED_SECTIONS for name in science if "." in name):
        return ""
    run = _find_run_dir(run_or_checkpoint_dir)
    return f"; run.fork={run} with another run.dir goes on from its newest checkpoint under the new settings"
