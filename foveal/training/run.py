"""One attempt at a run, as a stage's timetable sees it: steps, numbers, checkpoints, the way out."""

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog, best_effort, write_json
from foveal.checkpoint.store import CheckpointStore, check_same_science
from foveal.data import Batch, eval_batches, train_batches
from foveal.data.sampling.subset import SubsetName
from foveal.distributed.preemption import Preemption
from foveal.distributed.watchdog import Watchdog
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import AttemptSupersededError, CheckpointError
from foveal.tracking import open_tracker
from foveal.tracking.tracker import NullTracker, Tracker
from foveal.training.checkpointing import CheckpointSaver
from foveal.training.data_log import DataLog
from foveal.training.evaluations import Evaluations, collect_metric_values, filter_up_to_step
from foveal.training.exporting import Exporter
from foveal.training.lease import Attempt, Lease
from foveal.training.loop import LoopContext, Objective, Step, run_steps
from foveal.training.meters.metric_accumulator import MetricAccumulator, MetricRow
from foveal.training.meters.profiler import profile_steps
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter, measure_peak_memory
from foveal.training.plan import Plan
from foveal.training.progress import ProgressReporter
from foveal.training.provenance import collect_attempt_tags, warn_if_versions_changed
from foveal.training.rollback import RollbackController, read_rollbacks

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt at a run. ``attempt`` is its lease on the directory, which rank 0 holds."""

    stage_name: str
    path: Path
    plan: Plan
    world: World
    preemption: Preemption
    attempt: Attempt
    checkpoint_store: CheckpointStore
    watchdog: Watchdog
    checkpoint_saver: CheckpointSaver
    straggler_meter: StragglerMeter
    is_nested: bool = False
    metric_accumulator: MetricAccumulator = field(default_factory=MetricAccumulator)
    throughput_meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    tracker: Tracker = field(default_factory=NullTracker)
    progress: ProgressReporter = field(default_factory=ProgressReporter)
    is_preempted: bool = False
    is_finished: bool = False
    step: int = 0
    evaluations: Evaluations = field(
        default_factory=dict
    )  # the evaluations so far, the same on every rank and after any resume
    end_reason: str = ""  # the attempt ended
    _data_log: DataLog | None = None
    _rollback: RollbackController | None = None
    _checkpoint_owed: bool = False  # a checkpoint that was due after a refused update
    _is_hurried: bool = False  # asked to leave, and soon
    _last_row: MetricRow = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._straggler_log = AppendLog(self.path / "stragglers.jsonl")
        self.exporter = Exporter(self.path, self.stage_name, self.plan, self.world)

    @property
    def data_log(self) -> DataLog:
        """The ledger and the quarantine; ``resume`` opens them, else the first who asks: a collective."""
        if self._data_log is None:
            self._data_log = DataLog(self.path, self.plan, self.world, self.step, [])
        return self._data_log

    @property
    def rollback(self) -> RollbackController:
        """What was done about refused updates, from ``resume`` on."""
        assert self._rollback is not None, "resume reads it"
        return self._rollback

    # --- the beginning ---

    def resume(self, engine: Engine) -> int:
        """Load the newest whole checkpoint, open the tracker at its step, and return that step: 0 for a new run.

        The checkpoint may be of any number of ranks and any engine. A new run writes one before its first step: it
        shows that there is room, how long a save takes, and it is what a roll-back at the start goes back to.
        Raises: CheckpointError where the checkpoint is of other science or no room is left, LaunchError where a save
        takes longer than the notice that Slurm gives.
        """
        found, took = self.checkpoint_store.find_latest(), 0.0
        skipped: list[int] = []
        if found is not None:
            folder, state = found
            check_same_science(state.science, self.plan.science_settings(), folder)
            self.checkpoint_store.load(folder, engine, state)
            self.step, skipped, took = state.step, state.skipped, state.save_seconds
            self.evaluations = dict(state.scores)
            self.throughput_meter = ThroughputMeter(state.seconds)
            warn_if_versions_changed(state.versions)
            _log.info("resumed from %s, which %s wrote", folder, state.saved_by)
        self._rollback = RollbackController(
            self.path, self.plan.cfg.recovery, skipped, self.world.on_rank0(lambda: read_rollbacks(self.path))
        )
        self.start_attempt(self.step)
        self._data_log = DataLog(self.path, self.plan, self.world, self.step, self.rollback.skipped_batches)
        if took:
            self.checkpoint_saver.check_preemption_notice(took)
        else:  # nobody has timed a save yet
            self.checkpoint_saver.save_initial(engine, self.step, self.rollback.skipped_batches, self.throughput_meter)
        return self.step

    def start_attempt(self, step: int = 0, total_steps: int | None = None) -> None:
        """Open the tracker at a step, on rank 0; the progress counts to ``total``, or to the plan's steps.

        Raises: Restarting where attempt after attempt began at this step and came to nothing.
        """
        self.world.on_rank0(lambda: self._start_attempt(step, total_steps))

    def _start_attempt(self, step: int, total_steps: int | None) -> None:
        cfg, lease = self.plan.cfg, self.attempt
        assert isinstance(lease, Lease), "rank 0 holds it"
        self._raise_if_superseded(lease)  # loading may have taken minutes
        lease.record_start(step)
        # slurm/stage.sh counts the starts of a job that have no such line, or one that they had before.
        level = logging.DEBUG if self.is_nested else logging.INFO
        _log.log(level, "attempt %d begins at step %d: %s", lease.number, step, self.path)
        place = cfg.tracking, cfg.run.pipeline, step
        self.tracker, self._last_row = open_tracker(
            self.path, *place, lease.number, lambda: self._raise_if_superseded(lease)
        )
        self.tracker.log_settings(cfg.to_flat_dict() | self.plan.inherited_science, collect_attempt_tags(self.world))
        self.tracker.log_file(self.path / "config.yaml")
        self.progress = ProgressReporter(
            "" if self.is_nested else self.path.name, total_steps or self.plan.total_steps, step
        )

    def _raise_if_superseded(self, lease: Lease) -> None:
        if lease.check_superseded():
            raise AttemptSupersededError(f"another attempt has taken over {self.path}; this one writes nothing more")

    # --- steps ---

    def training_steps(
        self, engine: Engine, objective: Objective, start_step: int
    ) -> AbstractContextManager[Iterator[Step]]:
        """Every step that is left of this attempt; after several refused updates, those since the checkpoint again."""
        return closing(self._iterate_steps(engine, objective, start_step))

    def _iterate_steps(self, engine: Engine, objective: Objective, start_step: int) -> Generator[Step, None, None]:
        wanted = self.plan.cfg.log.profile_steps if self.world.rank == 0 else None
        while True:
            with self.training_batches(start_step) as batches:
                taken = run_steps(engine, batches, objective, self._loop_context(start_step))
                for step in profile_steps(taken, start_step, wanted, self.path / "profile"):
                    self.step = step.index
                    lost = self.rollback.observe_step(step.index, applied=step.applied)
                    if not step.applied:
                        self.data_log.log_refused_update(step.index)
                    yield step
                    if lost:
                        break
                    if self._checkpoint_owed and step.applied:
                        self.save_checkpoint(engine, step.index)
                else:
                    return
            start_step = self._roll_back(engine)

    def training_batches(self, start_step: int) -> AbstractContextManager[Iterator[Batch]]:
        """This rank's training batches from step ``start`` to the plan's stop."""
        plan, data = self.plan, self.plan.cfg.data
        return train_batches(
            plan.training_set,
            data,
            rank=self.world.rank,
            world_size=self.world.size,
            microbatch_size=plan.microbatch_size,
            start_step=start_step,
            stop_step=plan.stop_step,
            skipped_batches=self.rollback.skipped_batches,
        )

    def _loop_context(self, start_step: int) -> LoopContext:
        plan = self.plan
        self.throughput_meter.start()
        meters = self.metric_accumulator, self.throughput_meter, self.straggler_meter
        heard = self.watchdog.heartbeat, self.data_log.log_consumed
        return LoopContext(
            start_step, plan.stop_step, plan.accumulation_steps, self._compute_lr, self.world, *meters, *heard
        )

    def _compute_lr(self, step: int) -> float:
        watched = self.plan.cfg.plateau_metric
        return self.plan.compute_lr(
            step, collect_metric_values(filter_up_to_step(self.evaluations, step), watched) if watched else ()
        )

    def _roll_back(self, engine: Engine) -> int:
        """Restore the newest checkpoint and return its step; what was written down of later steps is void."""
        self.finish_checkpoint()
        found = self.checkpoint_store.find_latest()
        if found is None:
            raise CheckpointError(f"{self.path} has no whole checkpoint to go back to")
        folder, state = found
        self.rollback.record_rollback(state.step, is_writer=self.world.rank == 0)
        self.metric_accumulator.read_rows(self.world.all_reduce_sum)
        self.checkpoint_store.load(folder, engine, state)
        self.evaluations = filter_up_to_step(self.evaluations, state.step)
        self.throughput_meter = ThroughputMeter(state.seconds)
        self.data_log.close()
        self._data_log = DataLog(self.path, self.plan, self.world, state.step, self.rollback.skipped_batches)
        self.tracker.rewind(state.step)
        return state.step

    def evaluation_batches(self, step: int, *, split: str, subset: SubsetName) -> Generator[Batch, None, None]:
        """This rank's share of a part of a split: every sample exactly once over all ranks. Every rank takes part.

        Raises: DataError, on every rank, when one cannot read its data or too many samples do not decode.
        """
        plan, world = self.plan, self.world
        place = {"rank": world.rank, "world_size": world.size, "microbatch_size": plan.cfg.batch.at_once}
        batches = eval_batches(plan.dataset, plan.cfg.data, split=split, subset=subset, seed=plan.cfg.seed, **place)
        with closing(batches):
            while (batch := world.run_all_or_raise(lambda: next(batches, None))) is not None:
                self.watchdog.heartbeat(step, "evaluating")
                self.data_log.log_bad_samples(step, batch)
                yield batch
        self.data_log.flush_and_count()
        self.data_log.check_bad_limit()

    # --- numbers ---

    def log_metrics(self) -> MetricRow:
        """Reduce and deliver the rows of the steps since the last report; the last of them, with rates.

        Errors, on every rank: DataError when too many samples do not decode.
        """
        self.watchdog.heartbeat(self.step, "reporting")
        rows = self.metric_accumulator.read_rows(self.world.all_reduce_sum)
        if rows:
            slow, table = self.straggler_meter.report(int(rows[-1]["step"]), self.world.all_gather_objects)
            bad = {"bad_samples": float(self.data_log.flush_and_count())}
            rows[-1] |= (
                self.throughput_meter.read_rates()
                | measure_peak_memory(self.world.device)
                | bad
                | slow
                | self.checkpoint_saver.pop_save_metrics()
            )
            with self.throughput_meter.exclude_time():
                self.tracker.log_rows(rows)
                if self.world.rank == 0:
                    self._straggler_log.append_json_lines(table)
                self.progress.show_metrics(rows[-1])
            self._last_row = rows[-1]
            self.data_log.check_bad_limit()
        return self._last_row

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of an evaluation after a step, on every rank, in a row of their own; as after a resume, in its place."""
        self.evaluations[step] = metrics
        self.progress.log_results(step, metrics)
        self.tracker.log_results(metrics, step)

    def save_image(self, name: str, step: int, render: Any) -> None:
        """Save what ``draw()`` returns (a PIL image) under pictures/, on rank 0."""
        self.watchdog.heartbeat(step, "showing")
        if self.world.rank == 0:
            file = self.path / "pictures" / f"{name}-{step:08d}.png"
            with best_effort(file):
                file.parent.mkdir(exist_ok=True)
                render().save(file)
                self.tracker.log_file(file)

    # --- checkpoints, and the way out ---

    def save_checkpoint(self, engine: Engine, step: int) -> None:
        """Begin a checkpoint; what is reported is on disk first, so that no row is newer than the checkpoint's loss.

        After a refused update it waits for the next that is applied: weights that only give NaN are not worth keeping.
        """
        self.log_metrics()
        self._checkpoint_owed = not self.rollback.last_update_applied
        if self._checkpoint_owed:
            _log.warning("no checkpoint at step %d, whose update was refused", step)
        elif self._is_hurried and self.checkpoint_saver.is_pending:
            _log.warning("no checkpoint at step %d: there is time to finish the one that is being written", step)
        else:
            self.checkpoint_saver.start_checkpoint(
                engine, step, self.rollback.skipped_batches, self.evaluations, self.throughput_meter
            )

    def check_preemption(self) -> bool:
        """Whether any rank was asked to; all ranks hear the same answer. A checkpoint that is written gets its name.

        Three integers over all ranks every step: with long steps, asking less often would outlast the notice that
        Slurm gives, and an engine reads the gradient norm from the device in every step anyway.
        Raises: Superseded, on every rank, where another attempt has taken the run.
        """
        mine = (self.preemption.stop_reason is not None, self.checkpoint_saver.is_writing, self.attempt.is_superseded)
        asked, busy, lost = self.world.all_reduce_max([int(each) for each in mine])
        if lost:
            raise AttemptSupersededError(f"another attempt has taken over {self.path}; this one writes nothing more")
        if not busy:
            self.finish_checkpoint()
        self._is_hurried = bool(asked) and self.preemption.is_urgent(self.checkpoint_saver.slowest_save_seconds)
        return bool(asked)

    def end_preempted(self, step: int) -> None:
        """The end of an attempt that was asked to leave; the outermost run asks Slurm for the next one.

        It does so now, not after the tracker has had its time: the notice may be short. Where it is shorter than a save
        took, or somebody asked twice, the tracker gets none.
        Raises: NotRequeued where Slurm refuses.
        """
        self.finish_checkpoint()
        self.is_preempted = True
        newest = self.checkpoint_saver.latest_step
        kept = f"saved at step {step} of {self.plan.total_steps}" if newest == step else f"at {step}"
        lag = "" if newest in (None, step) else f", the newest checkpoint is of step {newest}"
        self.end_reason = f"asked to leave ({self.preemption.stop_reason or 'another rank'}): {kept}{lag}"
        _log.info("%s", self.end_reason)
        if not self.is_nested:
            self.preemption.requeue_if_preempted()
        if self._is_hurried or self.preemption.asked_again:
            self.tracker.skip_flush()

    def mark_finished(self, results: dict[str, Any] | None = None, best_metrics: dict[str, Any] | None = None) -> None:
        """Write down that the run is finished, and what came of it: new ``results``, and what is ``known``, as of the best."""
        self.finish_checkpoint()
        if self.world.rank == 0:
            came = (best_metrics or {}) | (results or {})
            summary = self._last_row | came
            self.progress.log_results(self.step or self.plan.total_steps, came)
            facts = {
                "seconds": round(self.throughput_meter.training_seconds, 3),
                "science": self.plan.science_settings(),
                "summary": summary,
            }
            if results:
                self.tracker.log_results(
                    results, self.step or self.plan.total_steps
                )  # a comparison takes no steps of its own
            write_json(self.path / "finished.json", facts)  # after the results: who finds it does nothing more
            self.tracker.log_file(self.path / "finished.json")
        self.is_finished = True
        self.world.barrier()

    def export_weights(
        self,
        engine: Engine,
        encoder_card: dict[str, Any],
        *,
        prefix: str,
        classes: tuple[str, ...] = (),
        name: str = "",
        head: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Leave the weights whose names begin with ``prefix``, without it, and their card, with ``results``, for the next.

        They go to export/, or to export/<name> where a run leaves several; beside them, as the card's ``head``, what is
        named ``head.``, if ``head`` says what builds it again.
        """
        self.watchdog.heartbeat(self.step, "exporting")
        about = {"prefix": prefix, "classes": classes, "head": head, "step": self.step}
        about["metrics"] = self._last_row | (metrics or {})
        folder = self.exporter.write_weights(engine, encoder_card, **about, name=name)
        self.tracker.log_file(folder / "card.json")

    def finish_checkpoint(self) -> None:
        """Finish the checkpoint that is being written, if there is one. Every rank calls it."""
        self.checkpoint_saver.finish_checkpoint(self.step, self.throughput_meter)

    def close(self) -> None:
        """Close what this rank has open; no collective."""
        self.progress.close()
        self._straggler_log.close()
        if self._data_log is not None:
            self._data_log.close()
