"""The checkpoints of a run as its steps see them: begun after one step, given their names after a later one."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from foveal.checkpoint.store import CheckpointStore, SaveResult, TrainState
from foveal.distributed.preemption import NOTICE_ENV_VAR, read_shutdown_notice
from foveal.distributed.watchdog import Watchdog
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, LaunchError
from foveal.training.evaluations import Evaluations
from foveal.training.meters.metric_accumulator import MetricRow
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.plan import Plan
from foveal.training.provenance import get_library_versions

_log = logging.getLogger(__name__)


class CheckpointSaver:
    """Every method is called by every rank."""

    def __init__(self, run_dir: Path, plan: Plan, store: CheckpointStore, world: World, watchdog: Watchdog) -> None:
        self._run, self._plan, self._store, self._world, self._watch = run_dir, plan, store, world, watchdog
        self._notice: float | None = None
        self._took: MetricRow = {}
        self.slowest_save_seconds = 0.0  # that the slowest save took, also in earlier attempts

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        return self._store.latest_step

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._store.is_writing

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and has no name yet; the same on every rank."""
        return self._store.is_save_pending

    def save_initial(
        self, engine: Engine, step: int, skipped_batches: Sequence[int], throughput_meter: ThroughputMeter
    ) -> None:
        """The checkpoint before any step is taken: it shows that there is room, and how long a save takes.

        Raises: CheckpointError where there is none, LaunchError where Slurm's notice is shorter than a save.
        """
        self.start_checkpoint(engine, step, skipped_batches, {}, throughput_meter)
        self.finish_checkpoint(step, throughput_meter)
        if self.latest_step is None:
            raise CheckpointError(
                f"{self._run} takes no checkpoint (the line above says why): free some space, or set run.dir to another disk"
            )
        self.check_preemption_notice()

    def check_preemption_notice(self, save_seconds: float = 0.0) -> None:
        """Refuse a job that Slurm would end before it has saved. ``seconds``: what a save took in earlier attempts.

        Raises: LaunchError, on every rank.
        """
        self.slowest_save_seconds = max(self.slowest_save_seconds, save_seconds)
        self._notice = self._world.on_rank0(self._compare_notice)

    def start_checkpoint(
        self,
        engine: Engine,
        step: int,
        skipped_batches: Sequence[int],
        evaluations: Evaluations,
        throughput_meter: ThroughputMeter,
    ) -> None:
        """Begin a checkpoint; one that is still being written is finished first."""
        self._watch.heartbeat(step, "saving")
        with throughput_meter.exclude_time():
            self._record_saved(
                self._store.save(engine, self._train_state(step, skipped_batches, evaluations, throughput_meter))
            )

    def finish_checkpoint(self, step: int, throughput_meter: ThroughputMeter) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name."""
        if self._store.is_save_pending:
            self._watch.heartbeat(step, "saving")
            with throughput_meter.exclude_time():
                self._record_saved(self._store.wait_and_commit())

    def pop_save_metrics(self) -> MetricRow:
        """What the newest checkpoint took, once: milliseconds that training stood still, seconds in all, and its size."""
        took, self._took = self._took, {}
        return took

    def _train_state(self, step: int, skipped: Sequence[int], scores: Evaluations, pace: ThroughputMeter) -> TrainState:
        cfg = self._plan.cfg.engine
        kind = f"deepspeed ZeRO {cfg.zero}" if cfg.kind == "deepspeed" else cfg.kind
        return TrainState(
            step=step,
            seconds=pace.training_seconds,
            ranks=self._world.size,
            engine=f"{kind}, {cfg.precision}",
            science=self._plan.science_settings(),
            versions=get_library_versions(),
            skipped=list(skipped),
            scores=dict(scores),
            save_seconds=self.slowest_save_seconds,
        )

    def _record_saved(self, saved: SaveResult | None) -> None:
        if saved is None:
            return
        stall, size = 1e3 * saved.stall_seconds, saved.num_bytes / 1e9
        self._took = {"save_stall_ms": stall, "save_seconds": saved.sync_seconds, "save_gigabytes": size}
        if self._notice is not None and self.slowest_save_seconds <= self._notice < saved.sync_seconds:
            _log.warning(
                "a checkpoint took %.0f s, and Slurm ends this job %.0f s after it was told: what was done since the "
                "last one would be lost, and the next start is refused",
                saved.sync_seconds,
                self._notice,
            )
        self.slowest_save_seconds = max(self.slowest_save_seconds, saved.sync_seconds)

    def _compare_notice(self) -> float | None:
        told = read_shutdown_notice()
        if told is None:
            return None
        if told.seconds < self.slowest_save_seconds:
            enough = 3 * math.ceil(self.slowest_save_seconds)
            raise LaunchError(
                f"a checkpoint takes {self.slowest_save_seconds:.0f} s here, and Slurm ends a job {told.seconds:.0f} s after it was told "
                f"({told.source}): ask for more there, as with --signal=USR1@{enough} in the job script; where sbatch was given "
                f"another --signal=USR1@N, which a job cannot see, set {NOTICE_ENV_VAR}=N beside it"
            )
        return told.seconds
