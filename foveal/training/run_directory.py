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
from foveal.checkpoint.store import CheckpointStore, check_same_science
from foveal.distributed.peer_failure import describe_peer_failure
from foveal.distributed.preemption import Preemption
from foveal.distributed.watchdog import Watchdog, run_watchdog
from foveal.distributed.world import World, describe_rank, slurm_job_tags
from foveal.errors import (
    AttemptSupersededError,
    ConfigError,
    FovealError,
    RestartLoopError,
    TrainingDivergedError,
    TrainingHungError,
)
from foveal.redact import RedactingFormatter, redact
from foveal.tracking import report_attempt_end
from foveal.tracking.tracker import AttemptState, NullTracker
from foveal.training.checkpointing import CheckpointSaver
from foveal.training.lease import Attempt, Lease, acquire_lease, describe_this_process
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.out_of_memory import diagnose_out_of_memory
from foveal.training.plan import Plan, StageConfig
from foveal.training.run import Run

_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}  # no later look finds it otherwise
_log = logging.getLogger(__name__)


@contextmanager
def open_run(
    stage_name: str, plan: Plan, world: World, preemption: Preemption, *, outer_run: Run | None = None
) -> Iterator[Run | None]:
    """Open the run directory and all that belongs to it; nothing if the run is finished already.

    ``within``: the run that this is a part of; it shows no progress of its own, and has the other's watch.
    Raises: ConfigError where there can be no directory, CheckpointError where it holds a run of other science, Held where
    another process writes it, Restarting where attempt after attempt got no further, Hung where a rank was lost on the way.
    """
    quiet = outer_run is not None
    path, finished = world.on_rank0(lambda: _inspect_run_dir(plan))  # file systems answer late: one rank looks
    if finished:
        if world.rank == 0 and not quiet:
            _log.info("%s is finished already; run.fresh=true starts another beside it", path)
        yield None
        return
    # What is written down, and what trials derive their folders from, is where the run really is.
    where = plan.cfg.run.model_copy(update={"dir": str(path), "fresh": False})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"run": where}))
    attempt = _acquire_attempt(path, plan, world)
    if attempt is None:
        yield None
        return
    end, begun = _AttemptEnd(), []
    logs, timeout = path / "logs", plan.cfg.engine.timeout_minutes * 60
    with ExitStack() as stack:
        stack.enter_context(_log_to_file(logs / f"rank-{world.rank:03d}.log"))
        _log.log(logging.DEBUG if quiet else logging.INFO, "foveal %s, %s", __version__, describe_rank(world))
        if isinstance(attempt, Lease):
            stack.callback(lambda: attempt.record_end(end.reason, end.exit_code, end.step))
        watched = (
            outer_run.watchdog
            if outer_run
            else run_watchdog(world, logs, timeout, lambda why: _record_hang(attempt, begun, why))
        )
        watch = watched if isinstance(watched, Watchdog) else stack.enter_context(watched)
        try:
            store = _build_store(path, plan, world, attempt, timeout / 2)
            saving, stragglers = (
                CheckpointSaver(path, plan, store, world, watch),
                StragglerMeter(world.device, socket.gethostname()),
            )
            run = Run(stage_name, path, plan, world, preemption, attempt, store, watch, saving, stragglers, quiet)
            begun.append(run)
            stack.callback(lambda: _close_tracker(run, end.state, end.reason))
            stack.callback(run.close)
            stack.callback(lambda: end.set_step(run.step))
            yield run
            run.finish_checkpoint()
        except BaseException as error:
            if (
                memory := diagnose_out_of_memory(error, stage_name, plan)
            ) is not None:  # first: NCCL's looks like a lost peer
                end.set_error(memory)
                raise memory from error
            if (sentence := describe_peer_failure(error)) and not isinstance(error, FovealError):
                hung = TrainingHungError(f"{sentence}; {watch.diagnose()}")
                end.set_error(hung)
                raise hung from error
            end.set_error(error)
            raise
        end.set_success(run)


@dataclass
class _AttemptEnd:
    """Why an attempt ended, for those who ask in the morning."""

    state: AttemptState = "failed"
    reason: str = ""
    exit_code: int = 1
    step: int | None = None

    def set_step(self, step: int) -> None:
        """The step it had come to."""
        self.step = step

    def set_error(self, error: BaseException) -> None:
        """An attempt that an error ended."""
        states: dict[type, AttemptState] = {TrainingDivergedError: "diverged", AttemptSupersededError: "superseded"}
        self.state = states.get(type(error), "failed")
        if isinstance(error, FovealError):
            self.reason, self.exit_code = str(error), error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            self.reason, self.exit_code = "Ctrl-C twice", 130
        else:
            self.reason, self.exit_code = redact(f"{type(error).__name__}: {error}"), 1

    def set_success(self, run: Run) -> None:
        """An attempt that ended by itself."""
        self.exit_code, self.reason = 0, run.end_reason
        self.state = "finished" if run.is_finished else "saved-and-left"


def _inspect_run_dir(plan: Plan) -> tuple[Path, bool]:
    """The run's directory and whether it is done. Raises: ConfigError, CheckpointError."""
    try:
        path = _resolve_run_dir(plan.cfg)
        for name in ("science.json", "finished.json"):
            file = path / name
            if file.exists():
                tree = read_json(file)
                check_same_science(tree.get("science", tree), plan.science_settings(), path)
        return path, (path / "finished.json").exists()
    except OSError as error:
        if error.errno not in _PERMANENT_ERRNOS:
            raise
        raise _unusable_dir_error(plan.cfg.run.dir, error) from None


def _unusable_dir_error(path: Path | str | None, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir={path} cannot be a run directory ({error.strerror}); set run.dir to a place that can be written"
    )


def _acquire_attempt(path: Path, plan: Plan, world: World) -> Attempt | None:
    """The next attempt at the run: rank 0's is the lease itself, the others know its facts.

    Nothing if the run was finished after ``_looked_at`` looked: nobody finishes it now.
    """
    held: list[Lease] = []

    def taken() -> Attempt | None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable_dir_error(path, error) from None
        cfg = plan.cfg
        try:
            held.append(
                acquire_lease(
                    path,
                    describe_this_process(world.size, slurm_job_tags()),
                    max_attempts_without_progress=cfg.run.restarts,
                )
            )
        except RestartLoopError as error:
            report_attempt_end(path, cfg.tracking, cfg.run.pipeline, "failed", str(error))
            raise
        if (path / "finished.json").exists():
            held.pop().record_end("the attempt before has finished the run", 0)
            return None
        cfg.dump(path / "config.yaml")
        write_json(path / "science.json", plan.science_settings())
        write_json(path / "job.json", slurm_job_tags())
        return Attempt(held[0].number, held[0].start_steps)

    known = world.on_rank0(taken)
    return held[0] if held else known


def _build_store(path: Path, plan: Plan, world: World, attempt: Attempt, timeout_seconds: float) -> CheckpointStore:
    superseded = attempt.check_superseded if isinstance(attempt, Lease) else lambda: False
    place = path / "checkpoints", plan.cfg.checkpoint, world, attempt.number, attempt.start_steps
    return CheckpointStore(*place, is_superseded=superseded, write_timeout_seconds=timeout_seconds)


def _record_hang(attempt: Attempt, begun: list[Run], why: str) -> None:
    if isinstance(attempt, Lease):
        attempt.record_end(why, TrainingHungError.exit_code)
        for run in begun:
            _close_tracker(run, "failed", why)


def _close_tracker(run: Run, state: AttemptState, why: str) -> None:
    """Close a run's tracker, on rank 0, also where the attempt ended before it had one; another attempt's is let alone."""
    if not isinstance(run.tracker, NullTracker):
        run.tracker.close(state, why)
    elif isinstance(run.attempt, Lease) and not run.attempt.check_superseded() and not run.is_nested:
        report_attempt_end(run.path, run.plan.cfg.tracking, run.plan.cfg.run.pipeline, state, why)


def _resolve_run_dir(cfg: StageConfig) -> Path:
    """The run directory; with run.fresh the first numbered sibling that does not exist, or the one this job made.

    Slurm starts a requeued job with the same command line: its fresh start was the first one.
    """
    assert cfg.run.dir is not None, "the command line fills it in"
    path = Path(cfg.run.dir)
    if not cfg.run.fresh:
        return path
    job, number = slurm_job_tags(), 1
    while path.exists():
        note = path / "job.json"
        made_by = read_json(note).get("slurm_job_id") if note.exists() else None
        if "slurm_restart_count" in job and made_by == job["slurm_job_id"]:
            return path
        number += 1
        path = Path(f"{cfg.run.dir}-{number}")
    return path


@contextmanager
def _log_to_file(file: Path) -> Iterator[None]:
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
