"""A pretraining job on a cluster, as somebody sees it who wants to disturb it: its job, its ranks, its run directory."""

import contextlib
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import STILL_GOING, Cluster, Rank
from server import Server

from foveal.atomic import encode_json_lines
from foveal.tracking.tail import read_step_rows
from foveal.training.lease import AttemptRecord, list_attempts

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "model.width=32", "model.depth=2", "model.heads=2", "decoder.width=32", "decoder.depth=1", "decoder.heads=2",
    "batch.global_size=128", "batch.max_micro_size=32", "log.every=1", "log.images_every=0", "data.ledger=true",
    "optim.warmup_epochs=1", "checkpoint.keep=3",
)  # fmt: skip
STEPS_PER_EPOCH = 11  # 1,437 images in batches of 128
# The launcher of the ranks belongs to the cluster; the one of these tests lets a step take its time.
ENVIRONMENT = """
check=(python)
ranks=(python {launcher} {pace})
srun_options=()
max_restarts=1000
pauses=(2 4 8)
exclude_bad_node=0
preflight=0
"""


class Stuck(Exception):
    """Something did not happen in time."""


def checkout(folder: Path, data: Path, pace: float) -> Path:
    """A folder that sbatch can be called in, whose ranks take ``pace`` seconds more for a step."""
    (folder / "slurm").mkdir(parents=True)
    for file in (ROOT / "slurm").glob("*.sh"):
        (folder / "slurm" / file.name).symlink_to(file)
    (folder / "slurm/environment.sh").unlink()
    launcher = Path(__file__).with_name("slowly.py")
    (folder / "slurm/environment.sh").write_text(ENVIRONMENT.format(launcher=launcher, pace=pace))
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data").mkdir()
    (folder / "data/digits").symlink_to(data)
    return folder


@dataclass
class Scene:
    """One run and its job. ``nodes``, ``tasks`` (a node) and ``settings`` are those of the next submission.

    ``small_disk``: where the checkpoints lie, if not in the run directory.
    """

    cluster: Cluster
    folder: Path
    name: str
    steps: int
    every: int
    dice: random.Random
    nodes: int = 2
    tasks: int = 2
    partition: str = "main"
    server: Server | None = None
    small_disk: Path | None = None
    settings: list[str] = field(default_factory=list)
    job: str = ""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.name

    def submit(self, environment: Mapping[str, str] | None = None) -> None:
        """``sbatch slurm/pretrain_mae.sh``, as a user would; ``environment`` is what the user's shell has besides."""
        if self.small_disk is not None and not self.run.exists():
            self.run.mkdir(parents=True)
            (self.run / "checkpoints").symlink_to(self.small_disk)
        resources = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks}", f"--partition={self.partition}"]
        resources += ["--cpus-per-task=1", "--gpus-per-node=0", f"--job-name={self.name}"]
        self.job = self.cluster.submit(
            "slurm/pretrain_mae.sh", *self.line(Path("runs", self.name)),
            options=resources, cwd=self.folder, env={"OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip

    def line(self, run: Path) -> list[str]:
        """The arguments of the stage, for this run or one that is like it but for its directory."""
        uri = self.server.uri if self.server else "null"
        own = [f"run.dir={run}", f"epochs={self.steps // STEPS_PER_EPOCH}", f"checkpoint.every={self.every}"]
        return ["digits", *SETTINGS, *own, f"tracking.uri={uri}", *self.settings]

    def cancel(self) -> None:
        """``scancel``, once all ranks are there: they save and leave."""
        self.world()
        self.cluster.run("scancel", self.job)
        self.until(self.over, "the job is cancelled", 60)

    def spare(self, rollbacks: list[dict[str, Any]]) -> None:
        """Tell the run, before its first step, which batches it goes past."""
        self.run.mkdir(parents=True)
        (self.run / "rollbacks.jsonl").write_bytes(encode_json_lines(rollbacks))

    def pace(self) -> float:
        """Seconds of a step, as the times of its rows tell."""
        times = [row["time"] for row in self.rows()]
        return statistics.median(later - earlier for earlier, later in pairwise(times))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the run wait, so that it is not over before the next fault."""
        (self.folder / "hold").touch()
        try:
            yield
        finally:
            (self.folder / "hold").unlink()

    def last_step(self) -> int:
        """The last step that the run has reported; 0 before the first."""
        return int(self.rows()[-1]["step"]) if self.rows() else 0

    def rows(self) -> list[dict[str, float]]:
        """The rows of the steps, without one that is being written."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text(errors="replace").split("\n")[:-1] if file.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [row for row in found if "loss" in row]

    def rollbacks(self) -> list[dict[str, Any]]:
        """How often the run went back behind steps that were refused, and past which batches."""
        return list(read_step_rows(self.run / "rollbacks.jsonl"))

    def said(self, pattern: str) -> list[str]:
        """All matches in the log of rank 0, which goes on over attempts."""
        file = self.run / "logs/rank-000.log"
        return re.findall(pattern, file.read_text(errors="replace")) if file.exists() else []

    def attempts(self) -> list[AttemptRecord]:
        """The attempts at the run, the newest last."""
        return list_attempts(self.run) if (self.run / "attempts").exists() else []

    def begun(self) -> tuple[int, int | None]:
        """The newest attempt's number, 0 before the first, and the step it began at, if it knows."""
        found = self.attempts()
        return (found[-1].number, found[-1].start_step) if found else (0, None)

    def checkpoints(self) -> list[Path]:
        """Whole ones, the newest last."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    def ranks(self) -> list[Rank]:
        """The living ranks of the newest attempt."""
        found = self.cluster.ranks(self.job)
        newest = max((rank.restarts for rank in found), default=0)
        return [rank for rank in found if rank.restarts == newest]

    def world(self) -> list[Rank]:
        """All ranks of the newest attempt, once they are there."""
        self.until(lambda: len(self.ranks()) == self.nodes * self.tasks, "all ranks are there", 120)
        return self.ranks()

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.job)

    def over(self) -> bool:
        return self.state()["JobState"] not in STILL_GOING

    def until(self, holds: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait until something holds. Raises: Stuck."""
        end = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > end:
                raise Stuck(f"{what}: not after {timeout:.0f} s (job {self.job} {self.state()['JobState']})")
            time.sleep(0.05)

    def finish(self, timeout: float) -> None:
        """Wait for the job's end. Raises: Stuck when it does not end, or not well."""
        self.until(self.over, "the job is over", timeout)
        if self.state()["JobState"] != "COMPLETED":
            raise Stuck(f"job {self.job} ended as {self.state()['JobState']}\n{self.tail()}")
        if not (self.run / "finished.json").exists():
            raise Stuck(f"job {self.job} ended without finishing the run\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.cluster.output(self.job).splitlines()[-lines:])
