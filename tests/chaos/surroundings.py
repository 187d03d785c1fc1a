"""What can happen to that which a run leans on: its disk, its data, the size of its job."""

import contextlib
import random
import re
import resource
import shutil
from pathlib import Path

from faults import Fault, OnSlurm
from scene import Scene

_UNSAVED = r"NO CHECKPOINT AT STEP (\d+)"


class Resized(OnSlurm):
    """The job is cancelled, and its user goes on with another number of ranks and another way to shard."""

    name = "cancelled, and gone on with other ranks and ZeRO"
    patience = 120.0

    def act(self) -> None:
        scene = self.scene
        scene.cancel()
        several = [(1, 2), (2, 1), (2, 2)]  # one rank alone has no peers that later faults could befall
        shapes = [(nodes, tasks, zero) for nodes, tasks in several for zero in (0, 1, 2, 3)]
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


class QuotaUsedUp(Fault):
    """No file of rank 0 can grow for a while: rows, ledger and checkpoints wait. Training goes on, and nothing is lost."""

    name = "quota of rank 0 used up"
    resumes = False

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.pid, self.before = 0, 0

    def strike(self) -> None:
        rank = self.scene.world()[0]
        self.before = self._unsaved()
        self.pid, self.target = rank.pid, f"rank 0 on {rank.node}"
        self._limit_files(0)

    def seen(self) -> bool:
        if self._unsaved() == self.before:
            return False
        self._limit_files(resource.RLIM_INFINITY)
        return True

    def mend(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._limit_files(resource.RLIM_INFINITY)

    def _limit_files(self, size: int) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def _unsaved(self) -> int:
        """Checkpoints that were not written, as the job's output tells: the log cannot grow either."""
        return len(re.findall(_UNSAVED, self.scene.cluster.output(self.scene.job)))


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
