"""Who may come to where the ranks meet, and is none of them: ranks of other runs and of other attempts, other programs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from faults import Fault
from harness import Rank
from scene import SETTINGS, Scene, Stuck

_PATIENCE = 120  # seconds for a process that is to be turned away: imports on a busy machine take most of them


@contextlib.contextmanager
def ranks_delayed(scene: Scene) -> Iterator[None]:
    """All ranks but the first are slow to begin."""
    (scene.folder / "late").touch()
    try:
        yield
    finally:
        (scene.folder / "late").unlink()


def kill_last_rank(scene: Scene) -> Rank:
    """Kill the run's last rank, and return who it was; the run starts again."""
    rank = scene.world()[-1]
    os.kill(rank.pid, signal.SIGKILL)
    return rank


def meeting_place(scene: Scene, dead: Rank) -> dict[str, str]:
    """Where rank 0 of the next attempt serves while it waits for the others, as the environment says it."""
    found: dict[str, str] = {}

    def serves() -> bool:
        for rank in scene.cluster.ranks(scene.job):
            if rank.rank == 0 and rank.restarts > dead.restarts and (ports := _listening_ports(rank.pid)):
                found.update(MASTER_ADDR=rank.node, MASTER_PORT=str(ports[0]))
        return bool(found)

    scene.until(serves, "rank 0 of the next attempt serves", 120)
    return found


def _listening_ports(pid: int) -> list[int]:
    """The TCP ports that a process listens on."""
    sockets, ports = set(), []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                    ports.append(int(local.rpartition(":")[2], 16))
    return ports


def _words(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode().split("\0")[:-1]


class Outsider(Fault):
    """Another run or attempt has the address of this one. A rank that comes to it is turned away, and makes no directory."""

    code = 2

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.other_run = scene.folder / f"runs/other-{time.monotonic_ns()}"

    def other_settings(self) -> list[str]:
        """The settings of a run that is not this one."""
        return ["digits", *SETTINGS, "seed=7", f"run.dir={self.other_run}", "epochs=1", "tracking.uri=null"]

    def by_hand(self, place: dict[str, str]) -> dict[str, str]:
        """The environment of a rank 1 that somebody starts by hand at a place."""
        size = str(self.scene.nodes * self.scene.tasks)
        return {**place, "RANK": "1", "WORLD_SIZE": size, "LOCAL_RANK": "0"}

    def join(self, node: str, environment: Mapping[str, str], line: list[str]) -> None:
        """Start a rank on a node, and wait until it has been turned away. Raises: Stuck where it is not."""
        scene = self.scene
        place = [*scene.cluster.machines.inside(node), "env", f"--chdir={scene.folder}"]
        command = [*place, sys.executable, "-m", "pretrain.run", *line]
        try:
            done = scene.cluster.run(*command, check=False, env=environment, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise Stuck(f"{self.name}: not turned away within {_PATIENCE} s") from None
        sentences = [each for each in done.stderr.splitlines() if each.startswith("foveal: ")]
        there = f":{environment['MASTER_PORT']} "
        if done.returncode != self.code or len(sentences) != 1 or there not in sentences[0]:
            raise Stuck(f"{self.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        self.target = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"

    def seen(self) -> bool:
        if self.other_run.exists():
            raise Stuck(f"{self.name}: {self.other_run} was made")
        return True


class Foreign(Outsider):
    """The ranks have met long ago, and train."""

    name = "rank of another run comes in mid-run"
    resumes = False

    def strike(self) -> None:
        scene = self.scene
        node = scene.world()[-1].node
        scene.until((scene.folder / "meeting").exists, "the ranks have met", 120)
        with scene.held():
            self.join(node, self.by_hand(json.loads((scene.folder / "meeting").read_text())), self.other_settings())


class ForeignFirst(Outsider):
    """The run starts again, and its own rank 1 is slow: the other run's comes before it."""

    name = "rank of another run comes before the run's own"
    patience = 120.0

    def strike(self) -> None:
        scene = self.scene
        with ranks_delayed(scene):
            rank = kill_last_rank(scene)
            self.join(rank.node, self.by_hand(meeting_place(scene, rank)), self.other_settings())


class Straggler(Outsider):
    """A rank that an earlier attempt has left comes to where the next one meets, with the very settings of the run."""

    name = "rank of a dead attempt comes late"
    code = 4
    patience = 120.0

    def strike(self) -> None:
        scene = self.scene
        last = scene.world()[-1]
        environment, words = (_words(last.pid, name) for name in ("environ", "cmdline"))
        environment = dict(word.split("=", 1) for word in environment)
        with ranks_delayed(scene):
            environment |= meeting_place(scene, kill_last_rank(scene))
            self.join(last.node, environment, words[words.index("pretrain.run") + 1 :])


class SecondStep(Outsider):
    """A second run starts as another step of the same job, whose ports might be the same. Both train, each for itself."""

    name = "another run as a second step of the job"
    resumes = False

    def strike(self) -> None:
        scene = self.scene
        scene.world()
        size = [f"--nodes={scene.nodes}", f"--ntasks={scene.nodes * scene.tasks}", "--cpus-per-task=1"]
        srun = ["srun", f"--jobid={scene.job}", "--overlap", "--input=none", *size]
        stage = [sys.executable, "-m", "pretrain.run", *self.other_settings()]
        with scene.held():
            done = scene.cluster.run(*srun, *stage, check=False, cwd=scene.folder, timeout=2 * _PATIENCE)
        self.target = f"job {scene.job}"
        if done.returncode or not (self.other_run / "finished.json").exists():
            raise Stuck(f"{self.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")

    def seen(self) -> bool:
        return True


class PortTaken(Fault):
    """Another program listens where the ranks would meet, and never answers. They meet elsewhere."""

    name = "another program at the port that is next"
    patience = 120.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.occupied, self.meeting = scene.folder / "occupied", scene.folder / "meeting"

    def strike(self) -> None:
        self.occupied.touch()
        self.meeting.unlink(missing_ok=True)
        kill_last_rank(self.scene)
        self.target = "what rank 0 would serve on"

    def seen(self) -> bool:
        if not self.meeting.exists() or not (taken := self.occupied.read_text()):
            return False
        port = json.loads(self.meeting.read_text())["MASTER_PORT"]
        self.target = f"port {taken}; they met at {port}"
        return port != taken

    def mend(self) -> None:
        self.occupied.unlink(missing_ok=True)
