"""What can happen to the parts of Slurm that stand around the ranks: srun, the batch shell, the controller, suspension."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults import Fault, OnSlurm, asleep
from machines import Process, kill
from scene import Scene, Stuck

_SLEEP = 75.0  # seconds: more than engine.timeout_minutes=1


class SrunKilled(OnSlurm):
    """The job script hears of no rank that failed, and asks for another start."""

    name = "srun killed"

    def act(self) -> None:
        scene = self.scene
        scene.world()
        _kill(scene, "srun", lambda each: each.name == "srun" and each.environment.get("SLURM_JOB_ID") == scene.job)
        self.target = f"that of job {scene.job}"


class ShellKilled(Fault):
    """The job script cannot ask for another start: its user submits it again, unless the ranks asked for one."""

    name = "batch shell killed"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.before = 0

    def strike(self) -> None:
        scene = self.scene
        scene.world()
        self.before = int(scene.state()["Restarts"])

        def is_shell(each: Process) -> bool:
            return "/slurm_script " in f"{each.command} " and each.environment.get("SLURM_JOB_ID") == scene.job

        _kill(scene, "batch shell", is_shell)
        self.target = f"that of job {scene.job}"

    def seen(self) -> bool:
        if self.scene.over():
            self.scene.submit()
            return True
        return int(self.scene.state()["Restarts"]) > self.before


def _kill(scene: Scene, what: str, which: Callable[[Process], bool]) -> None:
    if not kill(scene.cluster.folder, which):
        raise Stuck(f"job {scene.job} has no {what}")


class Suspended(Fault):
    """Every process of the job sleeps for longer than a collective may take."""

    name = "scontrol suspend"
    resumes = False

    def strike(self) -> None:
        self.scene.world()
        self.scene.cluster.run("scontrol", "suspend", self.scene.job)
        self.target = f"job {self.scene.job}"

    def seen(self) -> bool:
        if not all(asleep(rank.pid) for rank in self.scene.world()):
            return False
        time.sleep(_SLEEP)
        self.scene.cluster.run("scontrol", "resume", self.scene.job)
        return True


class ControllerKilled(OnSlurm):
    """A rank fails while nobody can start its job again: the job script waits until somebody can."""

    name = "slurmctld killed"
    patience = 120.0

    def act(self) -> None:
        scene = self.scene
        rank, said = scene.dice.choice(scene.world()), Path(scene.state()["StdOut"])
        waits = "controller does not answer"
        before = said.read_text(errors="replace").count(waits)
        scene.cluster.end("slurmctld", signal.SIGKILL)
        try:
            os.kill(rank.pid, signal.SIGKILL)
            end = time.monotonic() + 90
            while said.read_text(errors="replace").count(waits) == before and time.monotonic() < end:
                time.sleep(0.5)
        finally:
            scene.cluster.start("slurmctld", "slurmctld", "-D")
            scene.cluster.until(
                lambda: scene.cluster.run("squeue", check=False).returncode == 0, "slurmctld answers", 60
            )
        self.target = f"and rank {rank.rank} on {rank.node}"
