"""A run: a directory, a tracker, checkpoints and a pace, opened in order and closed in reverse."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foveal import __version__
from foveal.accounts import Accounts
from foveal.checkpoint.export import Card, write_export
from foveal.checkpoint.store import Store, TrainState, check_same_science
from foveal.data import Batch, eval_batches, train_batches
from foveal.data.subset import PartName
from foveal.distributed.engine import Engine
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World, describe, slurm_job
from foveal.errors import CheckpointError, Diverged
from foveal.files import write_json
from foveal.loop import Course
from foveal.progress import Progress
from foveal.provenance import attempt_facts, versions, warn_of_versions
from foveal.stage import Plan, StageConfig
from foveal.telemetry.pace import Pace, peak_memory
from foveal.telemetry.totals import Row, Totals
from foveal.tracking.jsonl import Jsonl
from foveal.tracking.tracker import Both, Silent, Status, Tracker, TrackingConfig, in_words

_TOLERATED = 3  # skipped steps in a row before a run counts as diverged
_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt at a run, as a stage's timetable sees it."""

    stage: str
    path: Path
    plan: Plan
    world: World
    preemption: Preemption
    store: Store
    quiet: bool = False
    totals: Totals = field(default_factory=Totals)
    pace: Pace = field(default_factory=Pace)
    tracker: Tracker = field(default_factory=Silent)
    progress: Progress = field(default_factory=Progress)
    accounts: Accounts | None = None
    skipped: list[int] = field(default_factory=list)
    left: bool = False
    finished: bool = False
    _diverging: int = 0
    _last: Row = field(default_factory=dict)

    def resume(self, engine: Engine) -> int:
        """Load the newest whole checkpoint, open the tracker at its step, and return that step: 0 for a new run.

        Errors: CheckpointError where the checkpoint is of other science, or of ranks or an engine it cannot go on with.
        """
        found = self.store.newest()
        step = 0
        if found is not None:
            folder, state = found
            check_same_science(state.science, self.plan.science(), folder)
            _check_same_shape(folder, state, self._state(state.step))
            engine.load(folder)
            step = state.step
            self.skipped = state.skipped
            self.pace = Pace(state.seconds)
            warn_of_versions(state.versions)
            _log.info("resumed from %s", folder)
        self.begin(step)
        self.accounts = Accounts(self.path, self.plan, self.world, step, self.skipped)
        return step

    def batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """This rank's training batches from step ``start`` to the plan's stop."""
        plan, data = self.plan, self.plan.cfg.data
        place = {"rank": self.world.rank, "size": self.world.size, "at_once": plan.at_once}
        return train_batches(plan.training, data, **place, start=start, stop=plan.stop, skipped=self.skipped)

    def evaluation(self, step: int, *, split: str, part: PartName) -> Iterator[Batch]:
        """This rank's share of a part of a split: every sample exactly once over all ranks. Every rank takes part.

        Errors: DataError, on every rank, when one cannot read its data or too many samples do not decode.
        """
        plan, world = self.plan, self.world
        place = {"rank": world.rank, "size": world.size, "at_once": plan.cfg.batch.at_once}
        batches = eval_batches(plan.dataset, plan.cfg.data, split=split, part=part, seed=plan.cfg.seed, **place)
        assert self.accounts is not None
        with closing(batches):
            while (batch := world.together(lambda: next(batches, None))) is not None:
                self.accounts.met(step, batch)
                yield batch
        self.accounts.report()
        self.accounts.check()

    def begin(self, step: int = 0, total: int | None = None) -> None:
        """Open the tracker at a step, on rank 0; the progress counts to ``total``, or to the plan's steps."""
        if self.world.rank == 0:
            self.tracker, self._last = _tracker(self.path, self.plan.cfg, step)
            self.tracker.settings(self.plan.cfg.flat() | self.plan.inherited, attempt_facts(self.world))
            self.tracker.file(self.path / "config.yaml")
            self.progress = Progress("" if self.quiet else self.path.name, total or self.plan.steps, step)

    def report(self) -> Row:
        """Reduce and deliver the rows of the steps since the last report; the last of them, with rates.

        Errors, on every rank: Diverged when the last steps in a row were all skipped, DataError when too many samples
        do not decode.
        """
        rows = self.totals.read(self.world.sum)
        if rows:
            assert self.accounts is not None
            rows[-1] |= (
                self.pace.read() | peak_memory(self.world.device) | {"bad_samples": float(self.accounts.report())}
            )
            with self.pace.paused():
                self.tracker.rows(rows)
                self.progress.show(rows[-1])
            self._last = rows[-1]
            self.accounts.check()
        for row in rows:
            self._diverging = 0 if row["applied"] and math.isfinite(row["loss"]) else self._diverging + 1
            if self._diverging >= _TOLERATED:
                raise Diverged(
                    f"loss or gradients were not finite in {self._diverging} steps up to step {int(row['step'])}; none of them "
                    f"changed a weight, and the newest checkpoint is whole: lower optim.lr_per_256 or lengthen "
                    f"optim.warmup_epochs"
                )
        return self._last

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers on data.val after a step; they have rows of their own."""
        self.tracker.results({f"val_{name}": value for name, value in numbers.items()}, step)

    def picture(self, name: str, step: int, draw: Any) -> None:
        """Save what ``draw()`` returns (a PIL image) under pictures/, on rank 0."""
        if self.world.rank == 0:
            file = self.path / "pictures" / f"{name}-{step:08d}.png"
            file.parent.mkdir(exist_ok=True)
            draw().save(file)
            self.tracker.file(file)

    def save(self, engine: Engine, step: int) -> None:
        """Write a checkpoint; what is reported is on disk first, so that no row is newer than the checkpoint's loss."""
        self.report()
        with self.pace.paused():
            self.store.save(engine, self._state(step))

    def asked_to_leave(self) -> bool:
        """Whether any rank was asked to; all ranks hear the same answer.

        One integer over all ranks every step: with long steps, asking less often would outlast the notice that Slurm
        gives, and an engine reads the gradient norm from the device in every step anyway.
        """
        return self.preemption.agreed()

    def leave(self, step: int) -> None:
        """The end of an attempt that was asked to leave and has saved."""
        self.left = True
        _log.info(
            "asked to leave (%s): saved at step %d of %d",
            self.preemption.heard or "another rank",
            step,
            self.plan.steps,
        )

    def finish(self, results: dict[str, Any] | None = None) -> None:
        """Write down that the run is finished, and what came of it besides its last numbers."""
        if self.world.rank == 0:
            summary = self._last | (results or {})
            facts = {"seconds": round(self.pace.seconds, 3), "science": self.plan.science(), "summary": summary}
            if results:
                self.tracker.results(results, self.plan.steps)
            write_json(self.path / "finished.json", facts)  # after the results: who finds it does nothing more
            self.tracker.file(self.path / "finished.json")
        self.finished = True
        self.world.barrier()

    def course(self, start: int) -> Course:
        """The steps that are left of this attempt, which begin now."""
        plan = self.plan
        assert self.accounts is not None
        self.pace.begin()
        return Course(
            start, plan.stop, plan.micros, plan.lr, self.world, self.totals, self.pace, self.accounts.consumed
        )

    def export(self, engine: Engine, encoder: dict[str, Any], *, prefix: str, classes: tuple[str, ...] = ()) -> None:
        """Leave the weights whose names begin with ``prefix``, without it, and their card for the next stage."""
        weights = engine.weights()
        if self.world.rank == 0:
            card = Card(
                stage=self.stage,
                encoder=encoder,
                mean=self.plan.mean,
                std=self.plan.std,
                classes=classes,
                step=self.plan.steps,
                metrics=self._last,
                science=self.plan.science(),
                versions=versions(),
            )
            mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            write_export(self.path / "export", mine, card)
            self.tracker.file(self.path / "export" / "card.json")
        self.world.barrier()

    def _state(self, step: int) -> TrainState:
        cfg = self.plan.cfg.engine
        kind = (
            f"deepspeed ZeRO {cfg.zero}, {cfg.precision}" if cfg.kind == "deepspeed" else f"{cfg.kind}, {cfg.precision}"
        )
        return TrainState(step, self.pace.seconds, self.world.size, kind, self.plan.science(), versions(), self.skipped)


def _check_same_shape(folder: Path, was: TrainState, now: TrainState) -> None:
    if (was.ranks, was.engine) != (now.ranks, now.engine) and "deepspeed" in was.engine + now.engine:
        raise CheckpointError(
            f"{folder} was saved by {was.ranks} ranks under {was.engine}; going on with {now.ranks} ranks under {now.engine} "
            f"is not possible yet: start as many ranks with the same engine, or begin anew with run.fresh=true"
        )
    if was.engine != now.engine:
        raise CheckpointError(
            f"{folder} was saved under {was.engine}; this run has {now.engine}: set engine back, or run.fresh=true"
        )


@contextmanager
def opened(
    stage: str, plan: Plan, world: World, preemption: Preemption, *, quiet: bool = False
) -> Iterator[Run | None]:
    """Open the run directory and all that belongs to it; nothing if the run is finished already.

    ``quiet`` is for a run inside a run: it shows no progress of its own.
    Errors: CheckpointError where the directory holds a run of other science.
    """
    found: Any = world.broadcast(_looked_at(plan) if world.rank == 0 else None)  # file systems answer late: one looks
    if isinstance(found, CheckpointError):
        raise found
    path, finished = found
    if finished:
        if world.rank == 0 and not quiet:
            _log.info("%s is finished already; run.fresh=true starts another beside it", path)
        yield None
        return
    # What is written down, and what trials derive their folders from, is where the run really is.
    where = plan.cfg.run.model_copy(update={"dir": str(path), "fresh": False})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"run": where}))
    if world.rank == 0:
        path.mkdir(parents=True, exist_ok=True)
        plan.cfg.dump(path / "config.yaml")
        write_json(path / "science.json", plan.science())
        write_json(path / "job.json", slurm_job())
    world.barrier()
    with _logging_to(path / "logs" / f"rank-{world.rank:03d}.log"):
        _log.log(logging.DEBUG if quiet else logging.INFO, "foveal %s, %s", __version__, describe(world))
        run = Run(stage, path, plan, world, preemption, Store(path / "checkpoints", plan.cfg.checkpoint, world), quiet)
        status: Status = "FAILED"
        try:
            yield run
            status = "FINISHED" if run.finished else "KILLED"
        finally:
            run.progress.close()
            try:
                if run.accounts is not None:
                    run.accounts.close()
            finally:
                run.tracker.close(status)


def _looked_at(plan: Plan) -> tuple[Path, bool] | CheckpointError:
    """The run's directory and whether it is done, or the mistake that every rank is to make together."""
    path = _directory(plan.cfg)
    try:
        for name in ("science.json", "finished.json"):
            file = path / name
            if file.exists():
                tree = json.loads(file.read_text())
                check_same_science(tree.get("science", tree), plan.science(), path)
    except CheckpointError as error:
        return error
    return path, (path / "finished.json").exists()


def _directory(cfg: StageConfig) -> Path:
    """The run directory; with run.fresh the first numbered sibling that does not exist, or the one this job made.

    Slurm starts a requeued job with the same command line: its fresh start was the first one.
    """
    assert cfg.run.dir is not None, "the command line fills it in"
    path = Path(cfg.run.dir)
    if not cfg.run.fresh:
        return path
    job, number = slurm_job(), 1
    while path.exists():
        note = path / "job.json"
        made_by = json.loads(note.read_text()).get("slurm_job_id") if note.exists() else None
        if "slurm_restart_count" in job and made_by == job["slurm_job_id"]:
            return path
        number += 1
        path = Path(f"{cfg.run.dir}-{number}")
    return path


def _tracker(path: Path, cfg: StageConfig, start: int) -> tuple[Tracker, Row]:
    """The tracker, and the last row that an earlier attempt left: one that was killed after its last step reports it."""
    jsonl = Jsonl(path / "metrics.jsonl", start)
    mlflow = connected(cfg.tracking, path, cfg.run.pipeline)
    return jsonl if mlflow is None else Both(jsonl, mlflow), jsonl.last


def connected(cfg: TrackingConfig, path: Path, pipeline: str | None) -> Tracker | None:
    """MLflow for this run, or a warning: a store that cannot be reached stops no training."""
    if cfg.uri is None:
        return None
    try:
        from foveal.tracking.mlflow import MLflow

        return MLflow(cfg, path, Path(pipeline) if pipeline else None)
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, it is not worth a run
        _log.warning("tracking: no MLflow at %s (%s); metrics.jsonl has every number", cfg.uri, in_words(error))
        return None


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """One log per rank."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:  # here only: who ends the process says it on stderr
        fact = {"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR"}
        handler.handle(logging.makeLogRecord(fact | {"msg": f"stopped by {type(error).__name__}: {error}"}))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
