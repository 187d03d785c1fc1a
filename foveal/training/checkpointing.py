"""The checkpoints of one attempt: a background thread writes a checkpoint, a later step commits it under its name."""

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
from foveal.training.provenance import get_library_versions, get_rounding_settings

_log = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves checkpoints and compares their duration with Slurm's shutdown notice. Every rank calls every method."""

    def __init__(self, run_dir: Path, plan: Plan, store: CheckpointStore, world: World, watchdog: Watchdog) -> None:
        self._run_dir = run_dir
        self._plan = plan
        self._store = store
        self._world = world
        self._watchdog = watchdog
        self._notice_seconds: float | None = None
        self._save_metrics: MetricRow = {}
        self.slowest_save_seconds = 0.0  # duration of the slowest save, earlier attempts included

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._store.latest_step

    @property
    def is_rank_writing(self) -> bool:
        """Whether the background thread of this rank is still writing."""
        return self._store.is_rank_writing

    @property
    def is_pending(self) -> bool:
        """Whether a started checkpoint is not committed yet; the same on every rank."""
        return self._store.is_save_pending

    def save_initial(
        self,
        engine: Engine,
        step: int,
        skipped_batches: Sequence[int],
        evaluations: Evaluations,
        throughput_meter: ThroughputMeter,
    ) -> None:
        """Save a checkpoint before the first step, to prove that the disk has room and to time a save.

        Raises: CheckpointError if the disk has no room, LaunchError if Slurm's notice is shorter than a save.
        """
        self.start_checkpoint(engine, step, skipped_batches, evaluations, throughput_meter)
        self.finish_checkpoint(step, throughput_meter)
        if self.latest_step is None:
            raise CheckpointError(
                f"{self._run_dir} takes no checkpoint (the line above says why): free some space, or set run.dir to "
                f"another disk"
            )
        self.check_notice_covers_save()

    def check_notice_covers_save(self, slowest_earlier_save_seconds: float = 0.0) -> None:
        """Refuse a job that Slurm would end before a save completes.

        ``save_seconds``: duration of the slowest save in earlier attempts. Raises: LaunchError, on every rank.
        """
        self.slowest_save_seconds = max(self.slowest_save_seconds, slowest_earlier_save_seconds)
        self._notice_seconds = self._world.on_rank0(lambda: read_notice_or_refuse(self.slowest_save_seconds))

    def start_checkpoint(
        self,
        engine: Engine,
        step: int,
        skipped_batches: Sequence[int],
        evaluations: Evaluations,
        throughput_meter: ThroughputMeter,
    ) -> None:
        """Start a checkpoint, after committing the previous one if it is still being written."""
        self._watchdog.heartbeat(step, "saving")
        with throughput_meter.exclude_time():
            self._record_saved(
                self._store.save(engine, self._train_state(step, skipped_batches, evaluations, throughput_meter))
            )

    def finish_checkpoint(self, step: int, throughput_meter: ThroughputMeter) -> None:
        """Wait for the pending checkpoint, if any, and commit it."""
        if self._store.is_save_pending:
            self._watchdog.heartbeat(step, "saving")
            with throughput_meter.exclude_time():
                self._record_saved(self._store.wait_and_commit())

    def pop_save_metrics(self) -> MetricRow:
        """Return and clear the metrics of the newest save: stall in milliseconds, duration in seconds, size in GB."""
        metrics = self._save_metrics
        self._save_metrics = {}
        return metrics

    def _train_state(
        self, step: int, skipped_batches: Sequence[int], evaluations: Evaluations, throughput_meter: ThroughputMeter
    ) -> TrainState:
        cfg = self._plan.cfg.engine
        kind = f"deepspeed ZeRO {cfg.zero}" if cfg.kind == "deepspeed" else cfg.kind
        return TrainState(
            step=step,
            seconds=throughput_meter.training_seconds,
            ranks=self._world.size,
            engine=f"{kind}, {cfg.precision}",
            science=self._plan.science_settings(),
            versions=get_library_versions(),
            skipped=list(skipped_batches),
            scores=dict(evaluations),
            save_seconds=self.slowest_save_seconds,
            rounding=get_rounding_settings(self._plan.cfg),
        )

    def _record_saved(self, result: SaveResult | None) -> None:
        if result is None:
            return
        self._save_metrics = {
            "save_stall_ms": 1e3 * result.stall_seconds,
            "save_seconds": result.seconds_without_overlap,
            "save_gigabytes": result.num_bytes_all_ranks / 1e9,
        }
        if (
            self._notice_seconds is not None
            and self.slowest_save_seconds <= self._notice_seconds < result.seconds_without_overlap
        ):
            _log.warning(
                "a checkpoint took %.0f s, and Slurm ends this job %.0f s after its warning: progress since the last "
                "checkpoint would be lost, and the next start is refused",
                result.seconds_without_overlap,
                self._notice_seconds,
            )
        self.slowest_save_seconds = max(self.slowest_save_seconds, result.seconds_without_overlap)


def read_notice_or_refuse(slowest_save_seconds: float) -> float | None:
    """Return the seconds between Slurm's warning and the end of this job; None if nothing ends it.

    Raises: LaunchError if a save takes longer.
    """
    notice = read_shutdown_notice()
    if notice is None:
        return None
    if notice.seconds < slowest_save_seconds:
        raise LaunchError(
            f"a checkpoint takes {slowest_save_seconds:.0f} s here, and Slurm ends a job {notice.seconds:.0f} s after "
            f"its warning ({notice.source}): ask for more there, as with --signal=USR1@"
            f"{3 * math.ceil(slowest_save_seconds)} in the job script; if sbatch got another --signal=USR1@N, which a "
            f"job cannot see, set {NOTICE_ENV_VAR}=N as well"
        )
    return notice.seconds
