"""The checkpoints of a run as its steps see them: begun after one step, given their names after a later one."""

import math
from pathlib import Path

from foveal.checkpoint.store import Saved, Store, TrainState
from foveal.distributed.engine import Engine
from foveal.distributed.preemption import notice
from foveal.distributed.watch import Watch
from foveal.distributed.world import World
from foveal.errors import CheckpointError, LaunchError
from foveal.telemetry.pace import Pace
from foveal.telemetry.totals import Row


class Saving:
    """Every method is called by every rank."""

    def __init__(self, run: Path, store: Store, world: World, watch: Watch) -> None:
        self._run, self._store, self._world, self._watch = run, store, world, watch
        self._seconds = 0.0
        self._took: Row = {}

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        return self._store.latest

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._store.busy

    def first(self, engine: Engine, state: TrainState, pace: Pace) -> None:
        """The checkpoint before the first step: it shows that there is room, and how long a save takes.

        Errors: CheckpointError where there is none, LaunchError where Slurm's notice is shorter than a save.
        """
        self.begin(engine, state, pace)
        self.settle(state.step, pace)
        if self.latest is None:
            raise CheckpointError(
                f"{self._run} takes no checkpoint (the line above says why): free some space, or set run.dir to another disk"
            )
        self._world.once(self._check_notice)

    def begin(self, engine: Engine, state: TrainState, pace: Pace) -> None:
        """Begin a checkpoint; one that is still being written is finished first."""
        self._watch.beat(state.step, "saving")
        with pace.paused():
            self._note(self._store.save(engine, state))

    def settle(self, step: int, pace: Pace) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name."""
        if self._store.pending:
            self._watch.beat(step, "saving")
            with pace.paused():
                self._note(self._store.finish())

    def numbers(self) -> Row:
        """What the newest checkpoint took, once: milliseconds that training stood still, seconds in all, and its size."""
        took, self._took = self._took, {}
        return took

    def _note(self, saved: Saved | None) -> None:
        if saved is not None:
            self._seconds = saved.seconds
            stall, size = 1e3 * saved.stall_seconds, saved.bytes / 1e9
            self._took = {"save_stall_ms": stall, "save_seconds": saved.seconds, "save_gigabytes": size}

    def _check_notice(self) -> None:
        told = notice()
        if told is not None and told.seconds < self._seconds:
            raise LaunchError(
                f"a checkpoint takes {self._seconds:.0f} s here, and Slurm ends a job {told.seconds:.0f} s after it was told "
                f"({told.source}): give it more, sbatch --signal=USR1@{3 * math.ceil(self._seconds)}"
            )
