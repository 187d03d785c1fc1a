"""The lineage of a fork: the checkpoint of another run that it began from, recorded in its ``fork.json``."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from foveal.atomic import read_json, write_json
from foveal.errors import CheckpointError

# Science that decides which samples a step takes.
ORDER_SETTINGS = (
    *("seed", "batch.global_size", "inherited.data", "data.train", "data.lanes", "data.window", "data.mix"),
    *("data.samples_per_class", "data.balance", "data.holdout_per_class", "data.fold"),
)
_FILE = "fork.json"


@dataclass(frozen=True)
class Fork:
    """A run's beginning in a checkpoint of another run.

    setting: run.fork as given. run: absolute path of the source's run directory. step: step of its checkpoint. digest:
    sha256 of the checkpoint's checksums.json. start_step: first step of the fork. highest_start_step: the highest one of
    all tries before the first checkpoint. mean, std: the source's pixel statistics. differences: science that differs,
    name to [was, is]. mlflow_run_id: the source's run in MLflow. checkpoint: where the source's checkpoint is read;
    None once the run has a checkpoint of its own; not recorded.
    """

    setting: str
    run: str
    step: int
    digest: str
    start_step: int
    highest_start_step: int
    mean: list[float] | None
    std: list[float] | None
    differences: dict[str, list[Any]]
    mlflow_run_id: str | None = None
    checkpoint: Path | None = None

    def differs_in(self, names: Collection[str]) -> list[str]:
        """Return the differing settings that have one of these names or lie in a section of that name."""
        sections = tuple(f"{name}." for name in names)
        return [found for found in self.differences if found in names or found.startswith(sections)]

    @property
    def has_same_order(self) -> bool:
        """Whether a step takes the same samples as in the source."""
        return not self.differs_in(ORDER_SETTINGS)

    def summary_lines(self) -> list[str]:
        """Return the source, the start and the differing science as lines of a plan."""
        start = (
            "goes on at that step, because the order of samples is the same"
            if self.has_same_order
            else "begins at step 0 of its own schedule, because the order of samples differs"
        )
        changes = ", ".join(f"{name} (was {was!r}, is {now!r})" for name, (was, now) in self.differences.items())
        return [
            f"fork      of {self.run}, step {self.step}; {start}",
            f"changed   {changes or 'no science'}",
        ]

    def tags(self) -> dict[str, str]:
        """Return the tracker's tags."""
        tags = {"fork.run": self.run, "fork.step": str(self.step)}
        return tags | ({"fork.mlflow_run_id": self.mlflow_run_id} if self.mlflow_run_id else {})

    def card_facts(self) -> dict[str, Any]:
        """Return the facts for the science of an export's card, which has no field of its own for them."""
        return {"inherited.fork.run": self.run, "inherited.fork.step": self.step}


def write_fork(run_dir: Path, fork: Fork) -> None:
    """Record a fork in its run directory."""
    write_json(run_dir / _FILE, {name: value for name, value in asdict(fork).items() if name != "checkpoint"})


def read_fork(run_dir: Path) -> Fork | None:
    """Return the recorded fork; None for a run that is no fork. Raises: CheckpointError for a damaged record."""
    file = run_dir / _FILE
    if not file.exists():
        return None
    record = read_json(file)
    if record.keys() != {field.name for field in fields(Fork)} - {"checkpoint"}:
        raise CheckpointError(f"{file} is not as foveal wrote it: restore it")
    return Fork(**record)
