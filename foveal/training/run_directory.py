"""Opening a run directory for one attempt, and closing it whatever happens."""

import errno
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from foveal import __version__
from foveal.atomic import read_json, write_json
from foveal.checkpoint.store import Store, check_same_science
from foveal.distributed.peer_failure import lost_peer
from foveal.distributed.preemption import Preemption
from foveal.distributed.watchdog import Watch, watching
from foveal.distributed.world import World, describe, slurm_job
from foveal.errors import ConfigError, Diverged, FovealError, Hung, Restarting, Superseded
from foveal.redact import RedactingFormatter, redact
from foveal.tracking import report_end
from foveal.tracking.tracker import Silent, State
from foveal.training.checkpointing import Saving
from foveal.training.lease import Attempt, Lease, take, this_process
from foveal.training.meters.stragglers import Stragglers
from foveal.training.out_of_memory import out_of_memory
from foveal.training.plan import Plan, StageConfig
from foveal.training.run import Run

_BARRED = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}  # no later look finds it otherwise
_log = logging.getLogger(__name__)


@contextmanager
def opened(
    stage: str, plan: Plan, world: World, preemption: Preemption, *, within: Run | None = None
) -> Iterator[Run | None]:
    """Open the run directory and all that belongs to it; nothing if the run is finished already.

    ``within``: the run that this is a part of; it shows no progress of its own, and has the other's watch.
    Errors: ConfigError where there can be no directory, CheckpointError where it holds a run of other science, Held where
    another process writes it, Restarting where attempt after attempt got no further, Hung where a rank was lost on the way.
    """
    quiet = within is not None
    path, finished = world.once(lambda: _looked_at(plan))  # file systems answer late: one rank looks
    if finished:
        if world.rank == 0 and not quiet:
            _log.info("%s is finished already; run.fresh=true starts another beside it", path)
        yield None
        return
    # What is written down, and what trials derive their folders from, is where the run really is.
    where = plan.cfg.run.model_copy(update={"dir": str(path), "fresh": False})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"run": where}))
    attempt = _taken(path, plan, world)
    if attempt is None:
        yield None
        return
    end, begun = _End(), []
    logs, timeout = path / "logs", plan.cfg.engine.timeout_minutes * 60
    with ExitStack() as stack:
        stack.enter_context(_logging_to(logs / f"rank-{world.rank:03d}.log"))
        _log.log(logging.DEBUG if quiet else logging.INFO, "foveal %s, %s", __version__, describe(world))
        if isinstance(attempt, Lease):
            stack.callback(lambda: attempt.ended(end.why, end.code, end.step))
        watched = within.watch if within else watching(world, logs, timeout, lambda why: _hung(attempt, begun, why))
        watch = watched if isinstance(watched, Watch) else stack.enter_context(watched)
        try:
            store = _store(path, plan, world, attempt, timeout / 2)
            saving, stragglers = Saving(path, plan, store, world, watch), Stragglers(world.device, socket.gethostname())
            run = Run(stage, path, plan, world, preemption, attempt, store, watch, saving, stragglers, quiet)
            begun.append(run)
            stack.callback(lambda: _closed(run, end.state, end.why))
            stack.callback(run.close)
            stack.callback(lambda: end.at(run.step))
            yield run
            run.settle()
        except BaseException as error:
            if (memory := out_of_memory(error, stage, plan)) is not None:  # first: NCCL's looks like a lost peer
                end.by(memory)
                raise memory from error
            if (sentence := lost_peer(error)) and not isinstance(error, FovealError):
                hung = Hung(f"{sentence}; {watch.accuse()}")
                end.by(hung)
                raise hung from error
            end.by(error)
            raise
        end.well(run)


@dataclass
class _End:
    """Why an attempt ended, for those who ask in the morning."""

    state: State = "failed"
    why: str = ""
    code: int = 1
    step: int | None = None

    def at(self, step: int) -> None:
        """The step it had come to."""
        self.step = step

    def by(self, error: BaseException) -> None:
        """An attempt that an error ended."""
        states: dict[type, State] = {Diverged: "diverged", Superseded: "superseded"}
        self.state = states.get(type(error), "failed")
        if isinstance(error, FovealError):
            self.why, self.code = str(error), error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            self.why, self.code = "Ctrl-C twice", 130
        else:
            self.why, self.code = redact(f"{type(error).__name__}: {error}"), 1

    def well(self, run: Run) -> None:
        """An attempt that ended by itself."""
        self.code, self.why = 0, run.why
        self.state = "finished" if run.finished else "saved-and-left"


def _looked_at(plan: Plan) -> tuple[Path, bool]:
    """The run's directory and whether it is done. Errors: ConfigError, CheckpointError."""
    try:
        path = _directory(plan.cfg)
        for name in ("science.json", "finished.json"):
            file = path / name
            if file.exists():
                tree = read_json(file)
                check_same_science(tree.get("science", tree), plan.science(), path)
        return path, (path / "finished.json").exists()
    except OSError as error:
        if error.errno not in _BARRED:
            raise
        raise _no_place(plan.cfg.run.dir, error) from None


def _no_place(path: Path | str | None, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir={path} cannot be a run directory ({error.strerror}); set run.dir to a place that can be written"
    )


def _taken(path: Path, plan: Plan, world: World) -> Attempt | None:
    """The next attempt at the run: rank 0's is the lease itself, the others know its facts.

    Nothing if the run was finished after ``_looked_at`` looked: nobody finishes it now.
    """
    held: list[Lease] = []

    def taken() -> Attempt | None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_place(path, error) from None
        cfg = plan.cfg
        try:
            held.append(take(path, this_process(world.size, slurm_job()), restarts=cfg.run.restarts))
        except Restarting as error:
            report_end(path, cfg.tracking, cfg.run.pipeline, "failed", str(error))
            raise
        if (path / "finished.json").exists():
            held.pop().ended("the attempt before has finished the run", 0)
            return None
        cfg.dump(path / "config.yaml")
        write_json(path / "science.json", plan.science())
        write_json(path / "job.json", slurm_job())
        return Attempt(held[0].number, held[0].starts)

    known = world.once(taken)
    return held[0] if held else known


def _store(path: Path, plan: Plan, world: World, attempt: Attempt, patience: float) -> Store:
    superseded = attempt.superseded if isinstance(attempt, Lease) else lambda: False
    place = path / "checkpoints", plan.cfg.checkpoint, world, attempt.number, attempt.starts
    return Store(*place, superseded=superseded, patience=patience)


def _hung(attempt: Attempt, begun: list[Run], why: str) -> None:
    if isinstance(attempt, Lease):
        attempt.ended(why, Hung.exit_code)
        for run in begun:
            _closed(run, "failed", why)


def _closed(run: Run, state: State, why: str) -> None:
    """Close a run's tracker, on rank 0, also where the attempt ended before it had one; another attempt's is let alone."""
    if not isinstance(run.tracker, Silent):
        run.tracker.close(state, why)
    elif isinstance(run.attempt, Lease) and not run.attempt.superseded() and not run.quiet:
        report_end(run.path, run.plan.cfg.tracking, run.plan.cfg.run.pipeline, state, why)


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
        made_by = read_json(note).get("slurm_job_id") if note.exists() else None
        if "slurm_restart_count" in job and made_by == job["slurm_job_id"]:
            return path
        number += 1
        path = Path(f"{cfg.run.dir}-{number}")
    return path


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """One log per rank."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:  # here only: who ends the process says it on stderr
        fact = {"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR"}
        fact |= {"msg": f"stopped by {type(error).__name__}: {error}"}
        fact |= {} if isinstance(error, FovealError) and not error.__cause__ else {"exc_info": sys.exc_info()}
        handler.handle(logging.makeLogRecord(fact))
        raise
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # a full disk, which has been told of
            handler.close()
