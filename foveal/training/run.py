"""One attempt at a run, as a stage's timetable sees it: steps, numbers, checkpoints, the way out."""

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import Growing, dispensable, write_json
from foveal.checkpoint.store import Store, check_same_science
from foveal.data import Batch, eval_batches, train_batches
from foveal.data.sampling.subset import PartName
from foveal.distributed.preemption import Preemption
from foveal.distributed.watchdog import Watch
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, Superseded
from foveal.tracking import open_tracker
from foveal.tracking.tracker import Silent, Tracker
from foveal.training.checkpointing import Saving
from foveal.training.data_log import Accounts
from foveal.training.evaluations import Scores, until, values
from foveal.training.exporting import Exports
from foveal.training.lease import Attempt, Lease
from foveal.training.loop import Course, Objective, Step, steps
from foveal.training.meters.metric_accumulator import Row, Totals
from foveal.training.meters.profiler import profiled
from foveal.training.meters.stragglers import Stragglers
from foveal.training.meters.throughput import Pace, peak_memory
from foveal.training.plan import Plan
from foveal.training.progress import Progress
from foveal.training.provenance import attempt_facts, warn_of_versions
from foveal.training.rollback import Recovery, read_journal

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt at a run. ``attempt`` is its lease on the directory, which rank 0 holds."""

    stage: str
    path: Path
    plan: Plan
    world: World
    preemption: Preemption
    attempt: Attempt
    store: Store
    watch: Watch
    saving: Saving
    stragglers: Stragglers
    quiet: bool = False
    totals: Totals = field(default_factory=Totals)
    pace: Pace = field(default_factory=Pace)
    tracker: Tracker = field(default_factory=Silent)
    progress: Progress = field(default_factory=Progress)
    left: bool = False
    finished: bool = False
    step: int = 0
    scores: Scores = field(default_factory=dict)  # the evaluations so far, the same on every rank and after any resume
    why: str = ""  # the attempt ended
    _accounts: Accounts | None = None
    _recovery: Recovery | None = None
    _owed: bool = False  # a checkpoint that was due after a refused update
    _hurried: bool = False  # asked to leave, and soon
    _last: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._table = Growing(self.path / "stragglers.jsonl")
        self.exports = Exports(self.path, self.stage, self.plan, self.world)

    @property
    def accounts(self) -> Accounts:
        """The ledger and the quarantine; ``resume`` opens them, else the first who asks: a collective."""
        if self._accounts is None:
            self._accounts = Accounts(self.path, self.plan, self.world, self.step, [])
        return self._accounts

    @property
    def recovery(self) -> Recovery:
        """What was done about refused updates, from ``resume`` on."""
        assert self._recovery is not None, "resume reads it"
        return self._recovery

    # --- the beginning ---

    def resume(self, engine: Engine) -> int:
        """Load the newest whole checkpoint, open the tracker at its step, and return that step: 0 for a new run.

        The checkpoint may be of any number of ranks and any engine. A new run writes one before its first step: it
        shows that there is room, how long a save takes, and it is what a roll-back at the start goes back to.
        Errors: CheckpointError where the checkpoint is of other science or no room is left, LaunchError where a save
        takes longer than the notice that Slurm gives.
        """
        found, took = self.store.newest(), 0.0
        skipped: list[int] = []
        if found is not None:
            folder, state = found
            check_same_science(state.science, self.plan.science(), folder)
            self.store.load(folder, engine, state)
            self.step, skipped, took = state.step, state.skipped, state.save_seconds
            self.scores = dict(state.scores)
            self.pace = Pace(state.seconds)
            warn_of_versions(state.versions)
            _log.info("resumed from %s, which %s wrote", folder, state.shape)
        self._recovery = Recovery(
            self.path, self.plan.cfg.recovery, skipped, self.world.once(lambda: read_journal(self.path))
        )
        self.begin(self.step)
        self._accounts = Accounts(self.path, self.plan, self.world, self.step, self.recovery.skipped)
        if took:
            self.saving.check_notice(took)
        else:  # nobody has timed a save yet
            self.saving.first(engine, self.step, self.recovery.skipped, self.pace)
        return self.step

    def begin(self, step: int = 0, total: int | None = None) -> None:
        """Open the tracker at a step, on rank 0; the progress counts to ``total``, or to the plan's steps.

        Errors: Restarting where attempt after attempt began at this step and came to nothing.
        """
        self.world.once(lambda: self._begin(step, total))

    def _begin(self, step: int, total: int | None) -> None:
        cfg, lease = self.plan.cfg, self.attempt
        assert isinstance(lease, Lease), "rank 0 holds it"
        self._fence(lease)  # loading may have taken minutes
        lease.started(step)
        # slurm/stage.sh counts the starts of a job that have no such line, or one that they had before.
        level = logging.DEBUG if self.quiet else logging.INFO
        _log.log(level, "attempt %d begins at step %d: %s", lease.number, step, self.path)
        place = cfg.tracking, cfg.run.pipeline, step
        self.tracker, self._last = open_tracker(self.path, *place, lease.number, lambda: self._fence(lease))
        self.tracker.settings(cfg.flat() | self.plan.inherited, attempt_facts(self.world))
        self.tracker.file(self.path / "config.yaml")
        self.progress = Progress("" if self.quiet else self.path.name, total or self.plan.steps, step)

    def _fence(self, lease: Lease) -> None:
        if lease.superseded():
            raise Superseded(f"another attempt has taken over {self.path}; this one writes nothing more")

    # --- steps ---

    def steps(self, engine: Engine, objective: Objective, start: int) -> AbstractContextManager[Iterator[Step]]:
        """Every step that is left of this attempt; after several refused updates, those since the checkpoint again."""
        return closing(self._steps(engine, objective, start))

    def _steps(self, engine: Engine, objective: Objective, start: int) -> Generator[Step, None, None]:
        wanted = self.plan.cfg.log.profile_steps if self.world.rank == 0 else None
        while True:
            with self.batches(start) as batches:
                taken = steps(engine, batches, objective, self._course(start))
                for step in profiled(taken, start, wanted, self.path / "profile"):
                    self.step = step.index
                    lost = self.recovery.met(step.index, applied=step.applied)
                    if not step.applied:
                        self.accounts.refused(step.index)
                    yield step
                    if lost:
                        break
                    if self._owed and step.applied:
                        self.save(engine, step.index)
                else:
                    return
            start = self._go_back(engine)

    def batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """This rank's training batches from step ``start`` to the plan's stop."""
        plan, data = self.plan, self.plan.cfg.data
        place = {"rank": self.world.rank, "size": self.world.size, "at_once": plan.at_once}
        return train_batches(plan.training, data, **place, start=start, stop=plan.stop, skipped=self.recovery.skipped)

    def _course(self, start: int) -> Course:
        plan = self.plan
        self.pace.begin()
        meters = self.totals, self.pace, self.stragglers
        heard = self.watch.beat, self.accounts.consumed
        return Course(start, plan.stop, plan.micros, self._lr, self.world, *meters, *heard)

    def _lr(self, step: int) -> float:
        watched = self.plan.cfg.watched
        return self.plan.lr(step, values(until(self.scores, step), watched) if watched else ())

    def _go_back(self, engine: Engine) -> int:
        """Restore the newest checkpoint and return its step; what was written down of later steps is void."""
        self.settle()
        found = self.store.newest()
        if found is None:
            raise CheckpointError(f"{self.path} has no whole checkpoint to go back to")
        folder, state = found
        self.recovery.go_back(state.step, writes=self.world.rank == 0)
        self.totals.read(self.world.sum)
        self.store.load(folder, engine, state)
        self.scores = until(self.scores, state.step)
        self.pace = Pace(state.seconds)
        self.accounts.close()
        self._accounts = Accounts(self.path, self.plan, self.world, state.step, self.recovery.skipped)
        self.tracker.rewind(state.step)
        return state.step

    def evaluation(self, step: int, *, split: str, part: PartName) -> Generator[Batch, None, None]:
        """This rank's share of a part of a split: every sample exactly once over all ranks. Every rank takes part.

        Errors: DataError, on every rank, when one cannot read its data or too many samples do not decode.
        """
        plan, world = self.plan, self.world
        place = {"rank": world.rank, "size": world.size, "at_once": plan.cfg.batch.at_once}
        batches = eval_batches(plan.dataset, plan.cfg.data, split=split, part=part, seed=plan.cfg.seed, **place)
        with closing(batches):
            while (batch := world.together(lambda: next(batches, None))) is not None:
                self.watch.beat(step, "evaluating")
                self.accounts.met(step, batch)
                yield batch
        self.accounts.report()
        self.accounts.check()

    # --- numbers ---

    def report(self) -> Row:
        """Reduce and deliver the rows of the steps since the last report; the last of them, with rates.

        Errors, on every rank: DataError when too many samples do not decode.
        """
        self.watch.beat(self.step, "reporting")
        rows = self.totals.read(self.world.sum)
        if rows:
            slow, table = self.stragglers.report(int(rows[-1]["step"]), self.world.gather)
            bad = {"bad_samples": float(self.accounts.report())}
            rows[-1] |= self.pace.read() | peak_memory(self.world.device) | bad | slow | self.saving.numbers()
            with self.pace.paused():
                self.tracker.rows(rows)
                if self.world.rank == 0:
                    self._table.add_json(table)
                self.progress.show(rows[-1])
            self._last = rows[-1]
            self.accounts.check()
        return self._last

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of an evaluation after a step, on every rank, in a row of their own; as after a resume, in its place."""
        self.scores[step] = numbers
        self.progress.result(step, numbers)
        self.tracker.results(numbers, step)

    def picture(self, name: str, step: int, draw: Any) -> None:
        """Save what ``draw()`` returns (a PIL image) under pictures/, on rank 0."""
        self.watch.beat(step, "showing")
        if self.world.rank == 0:
            file = self.path / "pictures" / f"{name}-{step:08d}.png"
            with dispensable(file):
                file.parent.mkdir(exist_ok=True)
                draw().save(file)
                self.tracker.file(file)

    # --- checkpoints, and the way out ---

    def save(self, engine: Engine, step: int) -> None:
        """Begin a checkpoint; what is reported is on disk first, so that no row is newer than the checkpoint's loss.

        After a refused update it waits for the next that is applied: weights that only give NaN are not worth keeping.
        """
        self.report()
        self._owed = not self.recovery.clean
        if self._owed:
            _log.warning("no checkpoint at step %d, whose update was refused", step)
        elif self._hurried and self.saving.pending:
            _log.warning("no checkpoint at step %d: there is time to finish the one that is being written", step)
        else:
            self.saving.begin(engine, step, self.recovery.skipped, self.scores, self.pace)

    def asked_to_leave(self) -> bool:
        """Whether any rank was asked to; all ranks hear the same answer. A checkpoint that is written gets its name.

        Three integers over all ranks every step: with long steps, asking less often would outlast the notice that
        Slurm gives, and an engine reads the gradient norm from the device in every step anyway.
        Errors: Superseded, on every rank, where another attempt has taken the run.
        """
        mine = (self.preemption.heard is not None, self.saving.busy, self.attempt.lost)
        asked, busy, lost = self.world.most([int(each) for each in mine])
        if lost:
            raise Superseded(f"another attempt has taken over {self.path}; this one writes nothing more")
        if not busy:
            self.settle()
        self._hurried = bool(asked) and self.preemption.hurried(self.saving.seconds)
        return bool(asked)

    def leave(self, step: int) -> None:
        """The end of an attempt that was asked to leave; the outermost run asks Slurm for the next one.

        It does so now, not after the tracker has had its time: the notice may be short. Where it is shorter than a save
        took, or somebody asked twice, the tracker gets none.
        Errors: NotRequeued where Slurm refuses.
        """
        self.settle()
        self.left = True
        newest = self.saving.latest
        kept = f"saved at step {step} of {self.plan.steps}" if newest == step else f"at {step}"
        lag = "" if newest in (None, step) else f", the newest checkpoint is of step {newest}"
        self.why = f"asked to leave ({self.preemption.heard or 'another rank'}): {kept}{lag}"
        _log.info("%s", self.why)
        if not self.quiet:
            self.preemption.go_on_later()
        if self._hurried or self.preemption.again:
            self.tracker.hurry()

    def finish(self, results: dict[str, Any] | None = None, known: dict[str, Any] | None = None) -> None:
        """Write down that the run is finished, and what came of it: new ``results``, and what is ``known``, as of the best."""
        self.settle()
        if self.world.rank == 0:
            came = (known or {}) | (results or {})
            summary = self._last | came
            self.progress.result(self.step or self.plan.steps, came)
            facts = {"seconds": round(self.pace.seconds, 3), "science": self.plan.science(), "summary": summary}
            if results:
                self.tracker.results(results, self.step or self.plan.steps)  # a comparison takes no steps of its own
            write_json(self.path / "finished.json", facts)  # after the results: who finds it does nothing more
            self.tracker.file(self.path / "finished.json")
        self.finished = True
        self.world.barrier()

    def export(
        self,
        engine: Engine,
        encoder: dict[str, Any],
        *,
        prefix: str,
        classes: tuple[str, ...] = (),
        name: str = "",
        head: dict[str, Any] | None = None,
        results: dict[str, float] | None = None,
    ) -> None:
        """Leave the weights whose names begin with ``prefix``, without it, and their card, with ``results``, for the next.

        They go to export/, or to export/<name> where a run leaves several; beside them, as the card's ``head``, what is
        named ``head.``, if ``head`` says what builds it again.
        """
        self.watch.beat(self.step, "exporting")
        about = {"prefix": prefix, "classes": classes, "head": head, "step": self.step}
        about["metrics"] = self._last | (results or {})
        folder = self.exports.write(engine, encoder, **about, name=name)
        self.tracker.file(folder / "card.json")

    def settle(self) -> None:
        """Finish the checkpoint that is being written, if there is one. Every rank calls it."""
        self.saving.settle(self.step, self.pace)

    def close(self) -> None:
        """Close what this rank has open; no collective."""
        self.progress.close()
        self._table.close()
        if self._accounts is not None:
            self._accounts.close()
