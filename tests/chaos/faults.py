"""What can happen to a run. Each kind strikes once, and knows how its effect is seen.

A kind that lasts is mended after the run has gone on.
"""

import contextlib
import os
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from harness import Rank
from machines import Kind
from scene import Scene


class Fault(ABC):
    """One fault at one moment. ``target`` says what it hit."""

    name = ""
    patience = 60.0  # seconds until its effect must have been seen
    resumes = True  # whether the run has to start again
    lasts = 0.0  # seconds that it goes on after it was seen
    holds = False  # whether the run waits until there is another attempt: it would get far while Slurm notices nothing

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.target = ""

    def impossible(self) -> str | None:
        """Why it cannot happen on this cluster."""
        return None

    @abstractmethod
    def strike(self) -> None: ...

    @abstractmethod
    def seen(self) -> bool:
        """Whether its effect is there."""
        ...

    def mend(self) -> None:  # noqa: B027 - most faults leave nothing to mend
        """Undo what lasts, after the run has gone on."""


class Signalled(Fault):
    """A signal to one rank."""

    def __init__(self, scene: Scene, number: signal.Signals) -> None:
        super().__init__(scene)
        self.number = number
        self.name = f"{number.name} to a rank"
        self.rank: Rank | None = None

    def strike(self) -> None:
        self.rank = self.scene.dice.choice(self.scene.world())
        self.target = f"rank {self.rank.rank} on {self.rank.node}"
        os.kill(self.rank.pid, self.number)

    def seen(self) -> bool:
        """It is gone: killed, or saved and left, or not yet able to save."""
        assert self.rank is not None
        return self.rank.pid not in {rank.pid for rank in self.scene.cluster.ranks(self.scene.job)}


class Stopped(Signalled):
    """A rank hangs: it is there, and does nothing. The watchdog must end the attempt."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene, signal.SIGSTOP)

    def impossible(self) -> str | None:
        minutes = [each for each in self.scene.settings if each.startswith("engine.timeout_minutes=")]
        return None if minutes else "the run would wait for half an hour"

    def seen(self) -> bool:
        assert self.rank is not None
        return asleep(self.rank.pid)


def asleep(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


class OnSlurm(Fault):
    """The job is requeued, by whatever way: seen when Slurm has counted it."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.before = 0

    def strike(self) -> None:
        self.before = int(self.scene.state()["Restarts"])
        self.act()

    @abstractmethod
    def act(self) -> None: ...

    def seen(self) -> bool:
        return int(self.scene.state()["Restarts"]) > self.before


class Requeued(OnSlurm):
    name = "scontrol requeue"

    def act(self) -> None:
        self.target = f"job {self.scene.job}"
        self.scene.cluster.run("scontrol", "requeue", self.scene.job)


class Warned(OnSlurm):
    """USR1 to every rank, as before the time limit."""

    name = "USR1 to all ranks"

    def act(self) -> None:
        self.scene.world()
        self.target = f"job {self.scene.job}"
        self.scene.cluster.run("scancel", "--signal=USR1", self.scene.job)


class Preempted(OnSlurm):
    """A job of more weight wants every node; it is cancelled as soon as it runs."""

    name = "preemption by another job"
    patience = 90.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.other = ""

    def impossible(self) -> str | None:
        return None if self.scene.partition == "low" else f"nobody preempts partition {self.scene.partition}"

    def act(self) -> None:
        self.scene.world()
        everything = [
            f"--nodes={len(self.scene.cluster.nodes)}",
            "--exclusive",
            "--partition=main",
            "--output=/dev/null",
        ]
        self.other = self.scene.cluster.submit("--wrap=sleep 300", options=everything)
        self.target = f"job {self.scene.job} by job {self.other}"

    def seen(self) -> bool:
        if super().seen() and self.scene.cluster.job(self.other)["JobState"] == "RUNNING":
            self.scene.cluster.run("scancel", self.other)
            return True
        return False

    def mend(self) -> None:
        self.scene.cluster.run("scancel", self.other, check=False)


class OnNode(OnSlurm):
    """Something befalls a node of the job: seen when Slurm calls it down and has requeued the job."""

    patience = 120.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.node = ""

    def impossible(self) -> str | None:
        return None if self.scene.nodes < len(self.scene.cluster.nodes) else "the job would have nowhere to go"

    def act(self) -> None:
        self.node = self.scene.dice.choice(sorted({rank.node for rank in self.scene.world()}))
        self.target = self.node
        self.befall()

    @abstractmethod
    def befall(self) -> None: ...

    def seen(self) -> bool:
        return "down" in self.scene.cluster.state(self.node) and super().seen()

    def mend(self) -> None:
        self.scene.cluster.machines.start(self.node)
        self.scene.until(lambda: "down" not in self.scene.cluster.state(self.node), f"{self.node} is back", 60)


class Crashed(OnNode):
    name = "node loses power"

    def befall(self) -> None:
        self.scene.cluster.machines.crash(self.node)


class DaemonKilled(OnNode):
    """The ranks go on while Slurm starts others elsewhere."""

    name = "slurmd killed"
    holds = True

    def befall(self) -> None:
        self.scene.cluster.machines.kill_slurmd(self.node)


class Cut(OnNode):
    """The node goes on alone, with its disks: its ranks may still write while others run elsewhere."""

    name = "network cut"
    holds = True

    def impossible(self) -> str | None:
        wired = self.scene.cluster.kind is Kind.WIRED
        return super().impossible() if wired else "no network namespaces here"

    def befall(self) -> None:
        self.scene.cluster.machines.cut(self.node)

    def mend(self) -> None:
        self.scene.cluster.machines.heal(self.node)
        super().mend()


class Damaged(Fault):
    """The newest checkpoint is damaged while nobody runs: seen when an older one is resumed from."""

    patience = 120.0

    def __init__(self, scene: Scene, how: Callable[[Path, random.Random], str], name: str) -> None:
        super().__init__(scene)
        self.how = how
        self.name = name
        self.newest = -1
        self.attempt = 0

    def strike(self) -> None:
        scene = self.scene
        scene.until(lambda: len(scene.checkpoints()) > 1, "there are two checkpoints", 120)
        self.attempt, _ = scene.begun()
        os.kill(scene.dice.choice(scene.world()).pid, signal.SIGKILL)
        scene.until(lambda: not scene.cluster.ranks(scene.job), "all ranks are gone", 60)
        folder = scene.checkpoints()[-1]
        self.newest = int(folder.name.split("-")[1])
        self.target = f"{folder.name}: {self.how(folder, scene.dice)}"

    def seen(self) -> bool:
        attempt, start = self.scene.begun()
        return attempt > self.attempt and start is not None and start < self.newest


def _largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def torn(folder: Path, dice: random.Random) -> str:
    file = _largest(folder)
    size = dice.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def flipped(folder: Path, dice: random.Random) -> str:
    file = _largest(folder)
    content = bytearray(file.read_bytes())
    at, bit = dice.randrange(len(content)), dice.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} of {file.name}"


def half_deleted(folder: Path, dice: random.Random) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    gone = dice.sample(files, max(1, len(files) // 2))
    for file in gone:
        file.unlink()
    return f"without {', '.join(file.name for file in gone)}"
