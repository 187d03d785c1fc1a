"""The stages of a pipeline as ``slurm/submit.py`` planned them, in ``pipeline.json`` of the pipeline's folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foveal.atomic import encode_json, read_json, write_atomic
from foveal.errors import CheckpointError

_FILE = "pipeline.json"


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a pipeline. run_dir: its run directory. job: the id of its Slurm job; None without Slurm."""

    name: str
    stage: str
    run_dir: Path
    job: str | None = None


def write_pipeline(folder: Path, stages: Sequence[PlannedStage]) -> None:
    """Record the stages of a pipeline, with run directories relative to its folder, if they differ. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"name": stage.name, "stage": stage.stage, "run": os.path.relpath(stage.run_dir, folder), "job": stage.job}
        for stage in stages
    ]
    content = encode_json({"stages": entries})
    file = folder / _FILE
    if not file.exists() or file.read_bytes() != content:
        write_atomic(file, content)


def read_pipeline_stages(folder: Path) -> tuple[PlannedStage, ...]:
    """Return the recorded stages of a pipeline; none for another folder or one of an older version.

    Raises: OSError, CheckpointError for a damaged file.
    """
    file = folder / _FILE
    if not file.exists():
        return ()
    try:
        return tuple(
            PlannedStage(str(entry["name"]), str(entry["stage"]), folder / entry["run"], entry.get("job"))
            for entry in read_json(file)["stages"]
        )
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{file} is not as foveal wrote it: start the pipeline again, which writes it anew"
        ) from None
