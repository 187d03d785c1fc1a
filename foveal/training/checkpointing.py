"""The checkpoints of a run: an attempt begins in the newest one, and saves the state after a step."""

import logging
import math

from foveal.checkpoint.state import TrainState
from foveal.distributed.preemption import NOTICE_ENV_VAR, LeaveRequest, read_shutdown_notice
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, LaunchError
from foveal.training.fork import load_fork, release_checkpoint
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.provenance import get_library_versions, get_rounding_settings, warn_if_rounding_changed
from foveal.training.rollback import RollbackController, read_rollbacks
from foveal.training.run import Run

_log = logging.getLogger(__name__)


def resume(run: Run, engine: Engine) -> int:
    """Load the newest complete checkpoint, begin the attempt at its step and return that step, 0 for a new run.

    A fork without a checkpoint begins in its source's. The checkpoint may come from any number of ranks and any engine.
    A new run saves one first: to prove that there is room, to time a save, as target of a roll-back.
    Raises: CheckpointError if the checkpoint is of other science or the disk has no room, LaunchError if a save takes
    longer than Slurm's notice.
    """
    latest = run.checkpoint_store.find_latest_valid()
    state, skipped_batches, save_seconds = None, [], 0.0
    if latest is not None:
        folder, state = latest
        run.plan.check_continues(state.science, folder)
        run.checkpoint_store.load(folder, engine, state)
        _log.info("resumed from %s, which %s wrote", folder, state.saved_by)
    elif run.plan.fork is not None:
        state = load_fork(run.plan.fork, run.plan.selection_metric, engine, run.world, run.exporter.adopt_best)
    if state is not None:
        run.step, skipped_batches, save_seconds = state.step, state.skipped, state.save_seconds
        run.evaluations = dict(state.scores)
        run.throughput_meter = ThroughputMeter(state.seconds)
        warn_if_rounding_changed(state, run.plan.cfg)
    rollbacks = run.world.on_rank0(lambda: read_rollbacks(run.path))
    run.rollback = RollbackController(run.path, run.plan.cfg.recovery, skipped_batches, rollbacks)
    run.start_attempt(run.step)
    run.open_data_log(run.step, run.rollback.skipped_batches)
    saver = run.checkpoint_saver
    saver.slowest_save_seconds = save_seconds
    if not save_seconds:  # no attempt has timed a save yet
        _save_first_checkpoint(run, engine)
    saver.notice_seconds = run.world.on_rank0(lambda: read_notice_or_refuse(saver.slowest_save_seconds))
    if not save_seconds:
        run.world.on_rank0(lambda: release_checkpoint(run.path))
    return run.step


def save_checkpoint(run: Run, engine: Engine, leave: LeaveRequest | None = None) -> None:
    """Start a checkpoint of the newest step, after writing all metrics up to it. Every rank calls it.

    After a refused update nothing is saved: weights that give NaN are useless. ``leave``: the request because of which
    the attempt saves; if it is urgent, a checkpoint in progress is finished instead.
    """
    run.log_metrics()
    if not run.rollback.last_update_applied:
        _log.warning("no checkpoint at step %d, whose update was refused", run.step)
    elif leave is not None and leave.is_urgent and run.checkpoint_saver.is_pending:
        _log.warning("no checkpoint at step %d: the time only suffices to finish the checkpoint in progress", run.step)
    else:
        with run.progress.activity("saving a checkpoint"):
            _start_checkpoint(run, engine)


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


def _save_first_checkpoint(run: Run, engine: Engine) -> None:
    """Save a checkpoint before the first step. Raises: CheckpointError if the disk has no room."""
    with run.progress.activity("saving the first checkpoint"):
        _start_checkpoint(run, engine)
        run.finish_checkpoint()
    if run.checkpoint_store.latest_step is None:
        raise CheckpointError(
            f"{run.path} takes no checkpoint (the line above says why): free some space, or set run.dir to another disk"
        )


def _start_checkpoint(run: Run, engine: Engine) -> None:
    """Copy the state after the newest step; the saver writes it while training continues."""
    run.watchdog.heartbeat(run.step, "saving")
    cfg = run.plan.cfg
    kind = f"deepspeed ZeRO {cfg.engine.zero}" if cfg.engine.kind == "deepspeed" else cfg.engine.kind
    with run.throughput_meter.exclude_time():
        state = TrainState(
            step=run.step,
            seconds=run.throughput_meter.training_seconds,
            ranks=run.world.size,
            engine=f"{kind}, {cfg.engine.precision}",
            science=run.plan.science_settings(),
            versions=get_library_versions(),
            skipped=list(run.rollback.skipped_batches),
            scores=dict(run.evaluations),
            save_seconds=run.checkpoint_saver.slowest_save_seconds,
            rounding=get_rounding_settings(cfg),
        )
        run.checkpoint_saver.save(engine, state)
