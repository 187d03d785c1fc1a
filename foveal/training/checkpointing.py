"""The checkpoints of a run as its steps see them: begun after one step, given their names after a later one."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from foveal.checkpoint.store import Saved, Store, TrainState
from foveal.distributed.preemption import NOTICE, notice
from foveal.distributed.watchdog import Watch
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, LaunchError
from foveal.training.evaluations import Scores
from foveal.training.meters.metric_accumulator import Row
from foveal.training.meters.throughput import Pace
from foveal.training.plan import Plan
from foveal.training.provenance import versions

_log = logging.getLogger(__name__)


class Saving:
    """Every method is called by every rank."""

    def __init__(self, run: Path, plan: Plan, store: Store, world: World, watch: Watch) -> None:
        self._run, self._plan, self._store, self._world, self._watch = run, plan, store, world, watch
        self._notice: float | None = None
        self._took: Row = {}
        self.seconds = 0.0  # that the slowest save took, also in earlier attempts

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        return self._store.latest

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._store.busy

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and has no name yet; the same on every rank."""
        return self._store.pending

    def first(self, engine: Engine, step: int, skipped: Sequence[int], pace: Pace) -> None:
        """The checkpoint before any step is taken: it shows that there is room, and how long a save takes.

        Errors: CheckpointError where there is none, LaunchError where Slurm's notice is shorter than a save.
        """
        self.begin(engine, step, skipped, {}, pace)
        self.settle(step, pace)
        if self.latest is None:
            raise CheckpointError(
                f"{self._run} takes no checkpoint (the line above says why): free some space, or set run.dir to another disk"
            )
        self.check_notice()

    def check_notice(self, seconds: float = 0.0) -> None:
        """Refuse a job that Slurm would end before it has saved. ``seconds``: what a save took in earlier attempts.

        Errors: LaunchError, on every rank.
        """
        self.seconds = max(self.seconds, seconds)
        self._notice = self._world.once(self._checked_notice)

    def begin(self, engine: Engine, step: int, skipped: Sequence[int], scores: Scores, pace: Pace) -> None:
        """Begin a checkpoint; one that is still being written is finished first."""
        self._watch.beat(step, "saving")
        with pace.paused():
            self._note(self._store.save(engine, self._state(step, skipped, scores, pace)))

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

    def _state(self, step: int, skipped: Sequence[int], scores: Scores, pace: Pace) -> TrainState:
        cfg = self._plan.cfg.engine
        kind = f"deepspeed ZeRO {cfg.zero}" if cfg.kind == "deepspeed" else cfg.kind
        return TrainState(
            step=step,
            seconds=pace.seconds,
            ranks=self._world.size,
            engine=f"{kind}, {cfg.precision}",
            science=self._plan.science(),
            versions=versions(),
            skipped=list(skipped),
            scores=dict(scores),
            save_seconds=self.seconds,
        )

    def _note(self, saved: Saved | None) -> None:
        if saved is None:
            return
        stall, size = 1e3 * saved.stall_seconds, saved.bytes / 1e9
        self._took = {"save_stall_ms": stall, "save_seconds": saved.seconds, "save_gigabytes": size}
        if self._notice is not None and self.seconds <= self._notice < saved.seconds:
            _log.warning(
                "a checkpoint took %.0f s, and Slurm ends this job %.0f s after it was told: what was done since the "
                "last one would be lost, and the next start is refused",
                saved.seconds,
                self._notice,
            )
        self.seconds = max(self.seconds, saved.seconds)

    def _checked_notice(self) -> float | None:
        told = notice()
        if told is None:
            return None
        if told.seconds < self.seconds:
            enough = 3 * math.ceil(self.seconds)
            raise LaunchError(
                f"a checkpoint takes {self.seconds:.0f} s here, and Slurm ends a job {told.seconds:.0f} s after it was told "
                f"({told.source}): ask for more there, as with --signal=USR1@{enough} in the job script; where sbatch was given "
                f"another --signal=USR1@N, which a job cannot see, set {NOTICE}=N beside it"
            )
        return told.seconds
