"""What can be wrong with a start: variables that a shell has kept, an environment that a node has not, a second job."""

import os
import re
import signal
import sys
from abc import abstractmethod
from pathlib import Path

from faults import Fault, OnSlurm
from scene import Scene, Stuck

_NO_PYTHON = r"python: (?:command not found|No such file)|No module named"


class Refused(Fault):
    """The job must end by itself with a sentence and without another start. Its user removes the cause and submits again."""

    patience = 120.0
    code = 2

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.before = 0

    def strike(self) -> None:
        self.before = int(self.scene.state()["Restarts"])
        self.act()

    @abstractmethod
    def act(self) -> None: ...

    def seen(self) -> bool:
        scene = self.scene
        if not scene.over():
            return False
        state, sentences = scene.state(), [line for line in scene.tail(60).splitlines() if line.startswith("foveal: ")]
        if (state["ExitCode"], state["Restarts"]) != (f"{self.code}:0", str(self.before)) or not sentences:
            raise Stuck(f"{self.name}: exit code {state['ExitCode']}, {state['Restarts']} restarts\n{scene.tail()}")
        self.mend()
        scene.submit()
        return True


class StaleVariables(Refused):
    """The user cancels the job and submits it from a shell where somebody once exported the variables of a lone rank."""

    name = "submitted with RANK and WORLD_SIZE of an old shell"

    def act(self) -> None:
        self.scene.cancel()
        self.scene.submit({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        self.before = 0
        self.target = f"job {self.scene.job}"


class StaleAddress(OnSlurm):
    """The user submits the job from a shell with an address that no rank can serve at: it is passed over."""

    name = "submitted with MASTER_ADDR and MASTER_PORT of an old shell"
    patience = 120.0

    def act(self) -> None:
        scene = self.scene
        scene.cancel()
        attempt, _ = scene.begun()
        scene.submit({"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29400"})
        self.target = f"job {scene.job}"
        scene.until(lambda: scene.begun()[0] > attempt, "there is another attempt", self.patience)

    def seen(self) -> bool:
        return True


class SubmittedTwice(Fault):
    """The user forgets that the job runs, and submits it again: the second job is refused, and the first goes on."""

    name = "submitted again while it runs"
    patience = 240.0
    resumes = False

    def strike(self) -> None:
        scene, first = self.scene, self.scene.job
        scene.world()
        try:
            scene.submit()
            with scene.held():
                scene.until(scene.over, "the second job is over", self.patience)
            code, said = scene.state()["ExitCode"], scene.tail()
            self.target = f"job {first} by job {scene.job}"
        finally:
            scene.job = first
        if code != "2:0" or "is being written by attempt" not in said:
            raise Stuck(f"{self.name}: exit code {code}\n{said}")

    def seen(self) -> bool:
        return True


class OutOfMemory(Refused):
    """A rank has no memory left for a batch: another start would need as much."""

    name = "a rank out of memory"

    def act(self) -> None:
        scene = self.scene
        rank = scene.dice.choice(scene.world())
        (scene.folder / "memory").write_text(str(rank.rank))
        self.target = f"rank {rank.rank} on {rank.node}"

    def mend(self) -> None:
        (self.scene.folder / "memory").unlink(missing_ok=True)


class EnvironmentGone(Fault):
    """At a start a node has no Python for its rank, and soon has it again. The job starts again by itself until then."""

    name = "environment gone on a node"
    patience = 180.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.node, self.place = "", Path(sys.executable).parent
        self.before = 0

    def impossible(self) -> str | None:
        return None if self.scene.cluster.named else "the nodes see one tree of files"

    def strike(self) -> None:
        rank = self.scene.dice.choice(self.scene.world())
        self.node, self.target = rank.node, f"{rank.node} without {self.place}"
        self.before = self._failures()
        self._on_node("mount", "-t", "tmpfs", "none", str(self.place))
        os.kill(rank.pid, signal.SIGKILL)

    def seen(self) -> bool:
        if self._failures() == self.before:
            return False
        self.mend()
        return True

    def mend(self) -> None:
        if self.node:
            self._on_node("umount", "--lazy", str(self.place))
            self.node = ""

    def _failures(self) -> int:
        """How often the job's output tells of a Python that was not there, or of another one."""
        return len(re.findall(_NO_PYTHON, self.scene.cluster.output(self.scene.job)))

    def _on_node(self, *command: str) -> None:
        self.scene.cluster.run(*self.scene.cluster.machines.inside(self.node), *command)
