"""What can happen to that which a run leans on: its disk, its data, its tracking server, the size of its job."""

import contextlib
import random
import shutil
import signal
import sys
from pathlib import Path

from faults import Fault, OnSlurm
from scene import Scene

_ALWAYS_500 = """
import http.server, sys
class Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)
    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Failing).serve_forever()
"""
_UNSAVED = r"NO CHECKPOINT AT STEP (\d+)"
_ASK = """
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
"""


class Resized(OnSlurm):
    """The job is cancelled, and its user goes on with another number of ranks and another way to shard."""

    name = "cancelled, and gone on with other ranks and ZeRO"
    patience = 120.0

    def act(self) -> None:
        scene = self.scene
        scene.world()
        scene.cluster.run("scancel", scene.job)
        scene.until(scene.over, "the job is cancelled", 60)
        shapes = [(nodes, tasks, zero) for nodes in (1, 2) for tasks in (1, 2) for zero in (0, 1, 2, 3)]
        scene.nodes, scene.tasks, zero = scene.dice.choice(
            [one for one in shapes if one[:2] != (scene.nodes, scene.tasks)]
        )
        scene.settings = [each for each in scene.settings if not each.startswith("engine.zero=")] + [
            f"engine.zero={zero}"
        ]
        scene.submit()
        self.before = -1  # a new job has not been requeued
        self.target = f"{scene.nodes} nodes x {scene.tasks} ranks, ZeRO {zero}"


class DiskFull(Fault):
    """The disk of the checkpoints is full for a while: seen when a checkpoint was not written. Training goes on."""

    name = "checkpoint disk full"
    resumes = False

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.filler = scene.run / "checkpoints/.filler"
        self.before = 0

    def impossible(self) -> str | None:
        return None if self.scene.small_disk else "no disk of its own for the checkpoints"

    def strike(self) -> None:
        assert self.scene.small_disk is not None
        self.before = len(self.scene.said(_UNSAVED))
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        self.target = f"{shutil.disk_usage(self.scene.small_disk).free} bytes left"

    def seen(self) -> bool:
        return len(self.scene.said(_UNSAVED)) > self.before

    def mend(self) -> None:
        self.filler.unlink(missing_ok=True)


class Poisoned(Fault):
    """Three batches in a row give NaN on one rank: the run goes back, and past them. It does not start again for that."""

    name = "NaN in three batches of a rank"
    resumes = False

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.file = scene.folder / "poison"
        self.before = 0

    def strike(self) -> None:
        self.scene.world()
        self.before = len(self.scene.rollbacks())
        step = self.scene.last_step() + 2
        known = self.scene.folder / "poisoned"
        self.file.write_text(f"{step} {len(known.read_text().split()) if known.exists() else 0}")
        self.target = f"rank 0, from step {step + 1} on"

    def seen(self) -> bool:
        return len(self.scene.rollbacks()) > self.before

    def mend(self) -> None:
        self.file.unlink(missing_ok=True)


class ShardDamaged(Fault):
    """Bytes of a shard are wrong for a while: the job must end rather than train on them, and its user starts it again."""

    name = "shard damaged for a while"
    patience = 120.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.file = Path()
        self.whole = b""

    def strike(self) -> None:
        self.scene.world()
        shards = sorted((self.scene.folder / "data/digits").resolve().glob("train-*.tar"))
        self.file = self.scene.dice.choice(shards)
        self.whole = self.file.read_bytes()
        wrong = bytearray(self.whole)
        for at in self.scene.dice.sample(range(len(wrong)), len(wrong) // 200):
            wrong[at] ^= 1 << random.Random(at).randrange(8)
        with self.file.open("r+b") as file:  # in place: it is open in every rank
            file.write(wrong)
        self.target = self.file.name

    def seen(self) -> bool:
        if self.whole and self.scene.over():
            self.mend()
            self.scene.submit()
            return True
        return False

    def mend(self) -> None:
        if self.whole:
            with self.file.open("r+b") as file:
                file.write(self.whole)
            self.whole = b""


class Unserved(Fault):
    """The tracking server is away: seen from where the job is. Training goes on, and what it missed is delivered later."""

    resumes = False
    lasts = 8.0

    def __init__(self, scene: Scene, how: str) -> None:
        super().__init__(scene)
        self.how = how
        self.name = f"tracking server {how}"

    def impossible(self) -> str | None:
        return None if self.scene.server else "no tracking server"

    def strike(self) -> None:
        assert self.scene.server is not None
        self.target = "MLflow's server"
        if self.how == "hangs":
            self.scene.cluster.send("mlflow", signal.SIGSTOP)
        else:
            self.scene.cluster.send("mlflow", signal.SIGKILL)
        if self.how == "fails":
            self.scene.cluster.start("failing", sys.executable, "-c", _ALWAYS_500, *self.scene.server.place)

    def seen(self) -> bool:
        assert self.scene.server is not None
        asked = self.scene.cluster.run(sys.executable, "-c", _ASK, self.scene.server.uri, check=False, timeout=30)
        return asked.returncode != 0

    def mend(self) -> None:
        assert self.scene.server is not None
        if self.how == "hangs":
            self.scene.cluster.send("mlflow", signal.SIGCONT)
            return
        if self.how == "fails":
            self.scene.cluster.end("failing", signal.SIGKILL)
        self.scene.server.start(self.scene.cluster)
