"""The steps of one attempt at a run, and the roll-backs that repeat a part of them."""

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing

from foveal.data.batch import Batch
from foveal.data.loader import train_batches
from foveal.engines.base import Engine
from foveal.errors import CheckpointError
from foveal.training.checkpointing import save_checkpoint
from foveal.training.evaluations import collect_metric_values, filter_up_to_step
from foveal.training.loop import LoopContext, Objective, Step, is_due, run_steps
from foveal.training.meters.profiler import profile_steps
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.run import Run

_log = logging.getLogger(__name__)


def training_steps(
    run: Run, engine: Engine, objective: Objective, start_step: int
) -> AbstractContextManager[Iterator[Step]]:
    """Iterate over the remaining steps of an attempt; a roll-back repeats the steps since the checkpoint."""
    return closing(_iterate_steps(run, engine, objective, start_step))


def finish_step(run: Run, engine: Engine, step: Step) -> bool:
    """Log and save what is due after a step; return whether the attempt has to leave, which is then marked.

    An attempt that leaves saves at any step, and neither evaluates nor draws: the next attempt does it first.
    """
    cfg, stop_step = run.plan.cfg, run.plan.stop_step
    if is_due(step.index, cfg.log.every, stop_step):
        run.log_metrics()
    leave = run.check_preemption(step.flags)
    if leave is not None or is_due(step.index, cfg.checkpoint.every, stop_step):
        save_checkpoint(run, engine, leave)
    if leave is not None:
        run.mark_preempted(step.index, leave)
    return leave is not None


def _iterate_steps(run: Run, engine: Engine, objective: Objective, start_step: int) -> Generator[Step, None, None]:
    cfg, stop_step = run.plan.cfg, run.plan.stop_step
    profiled_range = cfg.log.profile_steps if run.world.rank == 0 else None
    while True:
        is_checkpoint_owed = False  # one was due after a refused update, and waits for the next applied one
        with _training_batches(run, start_step) as batches:
            steps = run_steps(engine, batches, objective, _loop_context(run, start_step))
            for step in profile_steps(steps, start_step, profiled_range, run.path / "profile"):
                run.step = step.index
                run.progress.advance(step.index)
                if step.result is not None:
                    run.rollback.add_update(step.index, step.result.applied)
                run.read_updates(run.rollback.steps_in_flight)
                yield step
                if is_due(step.index, cfg.checkpoint.every, stop_step):  # finish_step saves after an applied update
                    is_checkpoint_owed = not run.rollback.last_update_applied
                elif is_checkpoint_owed and run.read_updates() and run.rollback.last_update_applied:
                    save_checkpoint(run, engine)
                    is_checkpoint_owed = False
                if run.rollback.is_due:
                    break
            if run.read_updates():
                if run.step < run.plan.total_steps:
                    _report_stop(run, is_checkpoint_owed=is_checkpoint_owed)
                return
        start_step = _roll_back(run, engine)


def _training_batches(run: Run, start_step: int) -> AbstractContextManager[Iterator[Batch]]:
    """Open this rank's training batches from ``start_step`` to the plan's stop step."""
    plan = run.plan
    return train_batches(
        plan.training_set,
        plan.cfg.data,
        rank=run.world.rank,
        world_size=run.world.size,
        microbatch_size=plan.microbatch_size,
        start_step=start_step,
        stop_step=plan.stop_step,
        skipped_batches=run.rollback.skipped_batches,
        label_reader=plan.label_reader,
        mean=plan.mean,
        workers=run.workers,
    )


def _loop_context(run: Run, start_step: int) -> LoopContext:
    run.throughput_meter.start()
    return LoopContext(
        after_step=start_step,
        last_step=run.plan.stop_step,
        accumulation_steps=run.plan.accumulation_steps,
        lr_schedule=lambda step: _compute_lr(run, step),
        world=run.world,
        metric_accumulator=run.metric_accumulator,
        throughput_meter=run.throughput_meter,
        straggler_meter=run.straggler_meter,
        heartbeat=run.watchdog.heartbeat,
        on_batches_consumed=run.data_log.log_consumed,
        read_flags=run.read_flags,
    )


def _compute_lr(run: Run, step: int) -> float:
    metric = run.plan.selection_metric
    if metric is None:
        return run.plan.compute_lr(step)
    return run.plan.compute_lr(step, collect_metric_values(filter_up_to_step(run.evaluations, step), metric.name))


def _roll_back(run: Run, engine: Engine) -> int:
    """Restore the newest checkpoint, void the records of later steps, and return the checkpoint's step."""
    run.finish_checkpoint()
    latest = run.checkpoint_store.find_latest_valid()
    if latest is None:
        raise CheckpointError(f"{run.path} has no complete checkpoint to roll back to")
    folder, state = latest
    run.rollback.record_rollback_or_raise(state.step, is_writer=run.world.rank == 0)
    run.metric_accumulator.pop_rows(run.world.all_reduce_sum)  # discards the rows
    run.checkpoint_store.load(folder, engine, state)
    run.evaluations = filter_up_to_step(run.evaluations, state.step)
    run.throughput_meter = ThroughputMeter(state.seconds)
    run.open_data_log(state.step, run.rollback.skipped_batches)
    run.tracker.rewind(state.step)
    run.progress.move_to(state.step)
    return state.step


def _report_stop(run: Run, *, is_checkpoint_owed: bool) -> None:
    """Log, and record as the attempt's end, that the run stopped at run.stop_at_step, and where the next one begins."""
    run.finish_checkpoint()
    saved_step = run.checkpoint_store.latest_step
    if is_checkpoint_owed:
        run.end_reason = (
            f"stopped at step {run.step}, whose update was refused: no checkpoint of it; the next attempt repeats the "
            f"steps after {saved_step}"
        )
        _log.warning("%s", run.end_reason)
        return
    run.end_reason = f"stopped at step {run.step} of {run.plan.total_steps}, as run.stop_at_step says"
    _log.info("%s; without that setting the same command goes on from step %s", run.end_reason, saved_step)
