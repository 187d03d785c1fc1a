"""One attempt at a run, as a stage uses it: metrics, exports and the end. Its steps: ``steps``."""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.store import CheckpointStore
from foveal.data.batch import Batch
from foveal.data.sampling.subset import SubsetName
from foveal.data.workers import WorkerPool
from foveal.distributed.preemption import LeaveRequest, Preemption
from foveal.distributed.watchdog import Watchdog
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.inspect.picture import Picture, save_picture
from foveal.quantities import format_count
from foveal.runs.record import NESTED_FOLDERS
from foveal.tracking.tracker import NullTracker, Tracker
from foveal.training.attempt_end import describe_leave
from foveal.training.attempt_start import begin_attempt, superseded_error
from foveal.training.data_log import DataLog
from foveal.training.evaluation_data import open_evaluation_data
from foveal.training.evaluations import Evaluations
from foveal.training.exporting import Exporter
from foveal.training.final_pictures import draw_final_pictures
from foveal.training.lease import Attempt, Lease
from foveal.training.loop import RankFlags
from foveal.training.meters.metric_accumulator import MetricAccumulator, MetricRow
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter, measure_peak_memory
from foveal.training.node_log import NodeLog
from foveal.training.plan import Plan
from foveal.training.progress import ProgressReporter
from foveal.training.report import log_report, write_finished
from foveal.training.rollback import RollbackController

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt at a run. ``attempt`` is a Lease on rank 0."""

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
    outer_progress: ProgressReporter | None = None  # of the run that contains this one
    outer_tracker: Tracker | None = None  # of that run, whose uploader delivers this one too
    metric_accumulator: MetricAccumulator = field(default_factory=MetricAccumulator)
    throughput_meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    node_log: NodeLog = field(default_factory=NodeLog)
    tracker: Tracker = field(default_factory=NullTracker)
    progress: ProgressReporter = field(default_factory=ProgressReporter)
    is_preempted: bool = False
    is_finished: bool = False
    step: int = 0
    evaluations: Evaluations = field(default_factory=dict)  # all so far, the same on every rank and after any resume
    end_reason: str = ""
    notes: Sequence[str] = ()  # sentences about the results, for finished.json
    evaluation_seconds: float = 0.0  # of this attempt
    workers: WorkerPool | None = None  # processes that read the data; None: this process does
    rollback: RollbackController = field(init=False, repr=False)  # of refused updates; ``checkpointing.resume`` sets it
    _data_log: DataLog | None = None
    _all_parts: str = ""  # "8 trials": of a run that consists of other runs or of probes
    _last_row: MetricRow = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started_at = time.monotonic()
        self._straggler_log = AppendLog(self.path / "stragglers.jsonl")
        self.exporter = Exporter(self.path, self.stage_name, self.plan, self.world)

    @property
    def is_nested(self) -> bool:
        """Whether another run contains this one."""
        return self.outer_progress is not None

    @property
    def is_part(self) -> bool:
        """Whether the run belongs to another one, which shows the results: nested, or a fold of a Slurm array."""
        return self.is_nested or self.path.parent.name in NESTED_FOLDERS

    @property
    def data_log(self) -> DataLog:
        """The ledger and the quarantine, which ``open_data_log`` opens."""
        assert self._data_log is not None, "open_data_log opens it"
        return self._data_log

    # --- start ---

    def open_data_log(self, step: int = 0, skipped_batches: Sequence[int] = ()) -> None:
        """Open the ledger and the quarantine at a step, in place of those that are open. A collective.

        ``checkpointing.resume`` calls it; a run that evaluates without training has to.
        """
        if self._data_log is not None:
            self._data_log.close()
        self._data_log = DataLog(self.path, self.plan, self.world, step, skipped_batches)

    def start_attempt(self, step: int = 0, *, num_parts: int | None = None, noun: str = "step") -> None:
        """Record the start step and open the tracker, on rank 0.

        Progress counts the plan's steps, or ``num_parts`` trials, folds or probes, named by ``noun``.
        Raises: RestartLoopError if the maximal number of attempts in a row started at this step without progress.
        """
        if num_parts is not None:
            self._all_parts = format_count(num_parts, noun)
        self.world.on_rank0(lambda: self._start_attempt(step, num_parts, noun))

    def _start_attempt(self, step: int, num_parts: int | None, noun: str) -> None:
        plan, lease = self.plan, self.attempt
        assert isinstance(lease, Lease), "rank 0 holds the lease"
        self.tracker, self._last_row = begin_attempt(
            self.stage_name,
            self.path,
            plan,
            self.world,
            lease,
            step,
            is_nested=self.is_nested,
            outer_tracker=self.outer_tracker,
        )
        self.progress = ProgressReporter(
            self.path.name,
            num_parts or plan.total_steps,
            step,
            noun=noun,
            stop=num_parts or plan.stop_step,
            steps_per_epoch=plan.steps_per_epoch,
            get_meter=lambda: self.throughput_meter,
            outer=self.outer_progress,
        )

    # --- data and metrics ---

    def read_updates(self, steps_in_flight: int = 0) -> bool:
        """Wait for the updates of all steps but the newest ones; return whether no roll-back is due.

        Called without steps in flight before the weights are saved, evaluated, shown or exported. Every rank calls it.
        """
        for step in self.rollback.read_updates(self.step - steps_in_flight):
            self.data_log.log_refused_update(step)
        return not self.rollback.is_due

    def evaluation_batches(
        self, step: int, *, split: str, subset: SubsetName, purpose: str = "evaluating"
    ) -> Generator[Batch, None, None]:
        """Yield this rank's batches of a subset of a split: every sample exactly once over all ranks. A collective.

        Progress shows the purpose. Raises: DataError, on every rank, if a rank cannot read its data or too many samples fail to decode.
        """
        batches, num_images = open_evaluation_data(self.plan, self.world, self.workers, split=split, subset=subset)
        with closing(batches), self.progress.activity(f"{purpose} on {split}", num_images) as activity:
            while (batch := self.world.run_all_or_raise(lambda: next(batches, None))) is not None:
                self.watchdog.heartbeat(step, "evaluating")
                self.data_log.log_bad_samples(step, batch)
                yield batch
                activity.advance(len(batch.ids) * self.world.size)
        self.data_log.flush_and_count_bad()
        self.data_log.check_bad_limit()

    def log_metrics(self) -> MetricRow:
        """Reduce and log the rows of the steps since the last call; return the last row, which also has rates.

        Rows that a roll-back is about to void are not logged.
        Raises: DataError, on every rank, if too many samples fail to decode.
        """
        self.watchdog.heartbeat(self.step, "reporting")
        if not self.read_updates():
            return self._last_row
        rows = self.metric_accumulator.pop_rows(self.world.all_reduce_sum)
        if rows:
            straggler_metrics, straggler_table = self.straggler_meter.pop_metrics_and_table(
                int(rows[-1]["step"]), self.node_log.share_exchange(self.world.all_gather_objects)
            )
            bad_samples = float(self.data_log.flush_and_count_bad())
            rows[-1] |= (
                self.throughput_meter.pop_rates()
                | measure_peak_memory(self.world.device)
                | {"bad_samples": bad_samples}
                | straggler_metrics
                | self.checkpoint_saver.pop_metrics()
            )
            with self.throughput_meter.exclude_time():
                self.tracker.log_rows(rows)
                if self.world.rank == 0:
                    self._straggler_log.append_json_lines(straggler_table)
                    self.node_log.write(int(rows[-1]["step"]))
                self.progress.show_row(rows[-1])
            self._last_row = rows[-1]
            self.data_log.check_bad_limit()
        return self._last_row

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record and log the metrics of the evaluation after a step, on every rank; a repeated step overwrites them."""
        self.evaluations[step] = metrics
        self.progress.log_results(step, metrics)
        self.tracker.log_results_once(metrics, step)

    def save_picture(self, name: str, step: int, render: Callable[[], Picture]) -> None:
        """Save the picture that ``render()`` returns as pictures/<name>-<step>.png, on rank 0; an error is a warning."""
        self.watchdog.heartbeat(step, "showing")
        if self.world.rank == 0:
            file = self.path / "pictures" / f"{name}-{step:08d}.png"
            try:
                file.parent.mkdir(exist_ok=True)
                save_picture(file, render())
                self.tracker.log_file(file)
            except Exception as error:  # noqa: BLE001 - no picture is a reason to end a training
                _log.warning("%s is not written: %s", file, error)

    # --- checkpoints and the end ---

    def finish_checkpoint(self) -> None:
        """Wait for the pending checkpoint, if any, and commit it. Every rank calls it."""
        with self.progress.activity("writing the checkpoint"):
            if self.checkpoint_saver.is_pending:
                self.watchdog.heartbeat(self.step, "saving")
                with self.throughput_meter.exclude_time():
                    self.checkpoint_saver.wait_and_commit()

    def read_flags(self) -> RankFlags:
        """Return this rank's flags."""
        return RankFlags(
            self.preemption.stop_reason is not None, self.checkpoint_saver.is_rank_writing, self.attempt.is_superseded
        )

    def check_preemption(self, flags: RankFlags | None = None) -> LeaveRequest | None:
        """Return the request to leave, the same on every rank, if any rank got one; commit a checkpoint once written.

        ``flags``: those of the newest step, on which the loop's ranks have agreed; None: the ranks agree here. They do
        in every step: with long steps, less frequent checks would exceed Slurm's notice.
        Raises: AttemptSupersededError, on every rank, if another attempt has taken over the run.
        """
        if flags is None:
            flags = RankFlags(*map(bool, self.world.all_reduce_max([int(flag) for flag in self.read_flags()])))
        if flags.is_superseded:
            raise superseded_error(self.path)
        if not flags.is_writing:
            self.finish_checkpoint()
        if not flags.is_asked_to_leave:
            return None
        return LeaveRequest(self.preemption.any_rank_urgent(self.checkpoint_saver.slowest_save_seconds))

    def mark_preempted(self, step: int, leave: LeaveRequest | None = None) -> None:
        """End an attempt that was asked to stop; the outermost run asks Slurm to requeue the job.

        The requeue comes before the tracker's flush, because the notice may be short. The tracker skips its flush if
        ``leave`` is urgent, or after a second request.
        Raises: RequeueRefusedError if Slurm refuses.
        """
        self.finish_checkpoint()
        self.is_preempted = True
        self.end_reason = describe_leave(
            self.preemption.stop_reason, step, self.plan.total_steps, self.checkpoint_store.latest_step, self._all_parts
        )
        self.progress.close()  # the sentence is below the bar: the last that is read
        _log.info("%s%s", self.end_reason, "" if self.is_nested else "; the same command continues")
        if not self.is_nested:
            self.preemption.requeue_unless_stopped_manually()
        if (leave is not None and leave.is_urgent) or self.preemption.requested_again:
            self.tracker.skip_flush()

    def mark_finished(self, results: dict[str, Any] | None = None, best_metrics: dict[str, Any] | None = None) -> None:
        """Mark the run finished with new ``results`` and the metrics of the best checkpoint, on every rank.

        Rank 0 draws pictures afterwards: nothing that goes wrong there makes the run start again, and no rank waits.
        """
        self.finish_checkpoint()
        if self.world.rank == 0:
            if results:  # before the file, with which later attempts do nothing; a comparison runs no steps itself
                self.tracker.log_results_once(results, self.step or self.plan.total_steps)
            file = write_finished(
                self.path,
                (best_metrics or {}) | (results or {}),
                self._last_row,
                self.plan.science_settings(),
                self.notes,
                training_seconds=self.throughput_meter.training_seconds,
                evaluation_seconds=self.evaluation_seconds,
                attempt_seconds=time.monotonic() - self._started_at,
            )
            self.tracker.log_file(file)
        self.is_finished = True
        self.world.barrier()
        if self.world.rank == 0:
            if self.plan.cfg.log.final_pictures and not self.is_part:
                self._save_final_pictures()
            self.progress.close()
            if not self.is_nested:
                log_report(self.stage_name, self.path, self.plan.cfg)

    def _save_final_pictures(self) -> None:
        """Save pictures of the data and of the exported encoder, the first of several students', unless asked to leave."""
        plan, data = self.plan, self.plan.cfg.data
        export = self.path.joinpath("export", *plan.cfg.export_subfolders[:1])
        pictures = draw_final_pictures(export, plan.dataset, data, plan.label_reader, self.world.device)
        with self.progress.activity("drawing pictures"):
            while self.preemption.stop_reason is None and (drawn := next(pictures, None)) is not None:
                self.save_picture(drawn[0], self.step or plan.total_steps, lambda picture=drawn[1]: picture)

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
        """Export the weights whose names begin with ``prefix``, with the prefix removed, and their card.

        The folder is export/, or export/<name> if a run has several exports. ``head``: how to rebuild the head, whose
        weights' names begin with ``head.``; None: no head. ``metrics`` go into the card with those of the last step.
        """
        self.watchdog.heartbeat(self.step, "exporting")
        with self.progress.activity("exporting the weights"), self.throughput_meter.exclude_time():
            folder = self.exporter.write_weights(
                engine,
                encoder_card,
                prefix=prefix,
                classes=classes,
                step=self.step,
                metrics=self._last_row | (metrics or {}),
                head=head,
                name=name,
            )
        self.tracker.log_file(folder / "card.json")

    def close(self) -> None:
        """Close this rank's open files and progress bar; no collective."""
        self.progress.close()
        self._straggler_log.close()
        self.node_log.close()
        if self._data_log is not None:
            self._data_log.close()
