"""The source of a fork: the checkpoint of another run that ``run.fork=RUN`` or ``RUN@STEP`` names."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from foveal.atomic import read_json, sha256
from foveal.checkpoint.retention import CheckpointDirectory
from foveal.checkpoint.state import read_train_state
from foveal.errors import CheckpointError, ConfigError, StorageUnreachableError
from foveal.renames import translate_science
from foveal.training.config import StageConfig
from foveal.training.lease import read_relevant_start_steps
from foveal.training.lineage import Fork

_MAX_TRIES = 5  # of reading a checkpoint before its run removes it


def parse_fork(setting: str) -> tuple[Path, int | None]:
    """Split ``RUN`` or ``RUN@STEP`` into the absolute run directory and the step (None: the newest checkpoint)."""
    match = re.fullmatch(r"(.+)@(\d+)", setting)
    if match is None or Path(setting).is_dir():
        return Path(setting).expanduser().resolve(), None
    return Path(match[1]).expanduser().resolve(), int(match[2])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints in a run directory by ascending step, whether a resume may use them or not."""
    return CheckpointDirectory(run_dir / "checkpoints", 0, {}).list_checkpoints()


def find_source(setting: str, run_dir: Path, cfg: StageConfig) -> tuple[Fork, dict[str, Any]]:
    """Return the fork of the checkpoint that a setting names, without start and differences, and its science."""
    source, step = parse_fork(setting)
    torn = None
    for _ in range(_MAX_TRIES):
        try:
            checkpoint = _choose_checkpoint(source, step, run_dir, cfg)
            return _read_source(setting, source, checkpoint)
        except FileNotFoundError as error:  # its run may have removed it after it was listed
            torn = error.filename
        except PermissionError as error:
            raise CheckpointError(f"run.fork={setting} cannot be read ({error})") from None
        except OSError as error:
            raise StorageUnreachableError(f"run.fork={setting} cannot be read ({error})") from None
    raise CheckpointError(f"run.fork={setting}: {torn} is missing; name another step with run.fork=RUN@STEP")


def _choose_checkpoint(source: Path, step: int | None, run_dir: Path, cfg: StageConfig) -> Path:
    """Return the source's newest checkpoint, or that of a step, among those that no later attempt invalidated."""
    _check_source(source, run_dir, cfg)
    root = source / "checkpoints"
    directory = CheckpointDirectory(root, 0, read_relevant_start_steps(source))
    folders = list_checkpoints(source)
    by_step = {_step_of(folder): folder for folder in folders if not directory.is_invalidated_by_attempt(folder)}
    if not by_step:
        raise CheckpointError(
            f"run.fork={source} has no checkpoint to begin from; give a run whose checkpoints are kept, or start from "
            f"weights with init"
        )
    if step is None:
        return by_step[max(by_step)]
    if step not in by_step:
        is_void = step in {_step_of(folder) for folder in folders}
        why = "only one that a later attempt has made void" if is_void else "none"
        raise CheckpointError(
            f"run.fork={source}@{step}: of step {step} there is {why}; there are the steps "
            f"{', '.join(map(str, sorted(by_step)))}"
        )
    return by_step[step]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _check_source(source: Path, run_dir: Path, cfg: StageConfig) -> None:
    """Raise ConfigError unless the source is the directory of another run of this stage."""
    if source == run_dir.resolve():
        raise ConfigError(
            f"run.fork={source} is the run itself; give the fork its own run.dir, or run.fresh=true for a numbered one"
        )
    if (source / "card.json").exists():
        raise ConfigError(f"run.fork={source} is an export, and a run directory is expected; init starts from weights")
    file = source / "science.json"
    if not file.exists():
        raise ConfigError(f"run.fork={source} is no run directory: it has no science.json")
    fields, shared = type(cfg).model_fields, StageConfig.model_fields
    sections = {name.split(".")[0] for name in translate_science(read_json(file), fields)} - {"inherited"}
    foreign, own = sections - fields.keys(), (sections & fields.keys()) - shared.keys()
    if len(foreign) > len(own):
        raise ConfigError(
            f"run.fork={source} is of another stage (its settings have {', '.join(sorted(foreign)[:3])}); a stage "
            f"starts from another stage's export, not from its checkpoints"
        )


def _read_source(setting: str, source: Path, checkpoint: Path) -> tuple[Fork, dict[str, Any]]:
    """Return the fork of a checkpoint, without start and differences, and its science. Raises: CheckpointError, OSError."""
    digest, science = sha256(checkpoint / "checksums.json"), read_train_state(checkpoint).science
    note = source / "mlflow.json"
    mlflow_run_id = None
    with suppress(OSError, ValueError, AttributeError):  # a run without MLflow has no note
        mlflow_run_id = json.loads(note.read_text()).get("run_id")
    fork = Fork(
        setting=setting,
        run=str(source),
        step=_step_of(checkpoint),
        digest=digest,
        start_step=0,
        highest_start_step=0,
        mean=science.get("inherited.mean"),
        std=science.get("inherited.std"),
        differences={},
        mlflow_run_id=mlflow_run_id,
        checkpoint=checkpoint,
    )
    return fork, science
