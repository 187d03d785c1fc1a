"""The run directory of an attempt: open it, execute the attempt, and record its end on every exit path."""

import errno
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from foveal import __version__
from foveal.atomic import read_json, write_json
from foveal.checkpoint.store import CheckpointStore, check_science_unchanged
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
from foveal.tracking import report_end_without_tracker
from foveal.tracking.tracker import AttemptState, NullTracker
from foveal.training.checkpointing import CheckpointSaver
from foveal.training.config import StageConfig
from foveal.training.lease import Attempt, Lease, acquire_lease
from foveal.training.lease_holder import current_holder
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.out_of_memory import diagnose_out_of_memory
from foveal.training.plan import Plan
from foveal.training.run import Run

_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}  # a retry fails in the same way
_log = logging.getLogger(__name__)


@contextmanager
def open_run(
    stage_name: str, plan: Plan, world: World, preemption: Preemption, *, outer_run: Run | None = None
) -> Iterator[Run | None]:
    """Open the run directory and yield the run; yield None if the run is finished already.

    ``outer_run``: the run that contains this one, which then shows no progress and shares the outer run's watchdog.
    Raises: ConfigError if the directory cannot exist, CheckpointError if it holds a run of other science,
    RunInUseError if another process writes it, RestartLoopError if the previous attempts made no progress,
    TrainingHungError if a rank is lost, OutOfMemoryError if memory does not suffice.
    """
    is_nested = outer_run is not None
    path, is_finished = world.on_rank0(lambda: _inspect_run_dir(plan))  # rank 0 only: file systems show changes late
    if is_finished:
        if world.rank == 0 and not is_nested:
            _log.info("%s is finished already; run.fresh=true starts another beside it", path)
        yield None
        return
    # The resolved directory goes into config.yaml, and trials derive their folders from it.
    run_cfg = plan.cfg.run.model_copy(update={"dir": str(path), "fresh": False})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"run": run_cfg}))
    attempt = _acquire_attempt(path, plan, world)
    if attempt is None:
        yield None
        return
    end = _AttemptEnd()
    open_runs: list[Run] = []
    logs, timeout = path / "logs", plan.cfg.engine.timeout_minutes * 60
    with ExitStack() as stack:
        stack.enter_context(_log_to_file(logs / f"rank-{world.rank:03d}.log"))
        _log.log(logging.DEBUG if is_nested else logging.INFO, "foveal %s, %s", __version__, describe_rank(world))
        if isinstance(attempt, Lease):
            stack.callback(lambda: attempt.record_end_and_release(end.reason, end.exit_code, end.step))
        if outer_run is not None:
            watchdog = outer_run.watchdog
        else:
            on_hang = partial(_record_hang, attempt, open_runs)
            watchdog = stack.enter_context(run_watchdog(world, logs, timeout, on_hang))
        try:
            store = _build_store(path, plan, world, attempt, timeout / 2)
            saver = CheckpointSaver(path, plan, store, world, watchdog)
            meter = StragglerMeter(world.device, socket.gethostname())
            run = Run(stage_name, path, plan, world, preemption, attempt, store, watchdog, saver, meter, is_nested)
            open_runs.append(run)
            stack.callback(lambda: _close_tracker(run, end.state, end.reason))
            stack.callback(run.close)
            stack.callback(lambda: end.set_step(run.step))
            yield run
            run.finish_checkpoint()
        except BaseException as error:
            final_error = _translate_error(error, stage_name, plan, watchdog)
            end.set_error(final_error)
            if final_error is error:
                raise
            raise final_error from error
        end.set_success(run)


def _translate_error(error: BaseException, stage_name: str, plan: Plan, watchdog: Watchdog) -> BaseException:
    """Return OutOfMemoryError or TrainingHungError in place of a library's error; any other error as it is."""
    out_of_memory = diagnose_out_of_memory(error, stage_name, plan)
    if out_of_memory is not None:  # first, because NCCL's out-of-memory error looks like a lost peer
        return out_of_memory
    if (peer_failure := describe_peer_failure(error)) and not isinstance(error, FovealError):
        return TrainingHungError(f"{peer_failure}; {watchdog.log_diagnosis_once()}")
    return error


@dataclass
class _AttemptEnd:
    """The end of an attempt as the lease and the tracker record it."""

    state: AttemptState = "failed"
    reason: str = ""
    exit_code: int = 1
    step: int | None = None

    def set_step(self, step: int) -> None:
        """Set the last step of the attempt."""
        self.step = step

    def set_error(self, error: BaseException) -> None:
        """Set state, reason and exit code from the error that ended the attempt."""
        states: dict[type, AttemptState] = {TrainingDivergedError: "diverged", AttemptSupersededError: "superseded"}
        self.state = states.get(type(error), "failed")
        if isinstance(error, FovealError):
            self.reason, self.exit_code = str(error), error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            self.reason, self.exit_code = "Ctrl-C twice", 130
        else:
            self.reason, self.exit_code = redact(f"{type(error).__name__}: {error}"), 1

    def set_success(self, run: Run) -> None:
        """Set state, reason and exit code of an attempt that ended without an error."""
        self.exit_code, self.reason = 0, run.end_reason
        self.state = "finished" if run.is_finished else "saved-and-left"


def _inspect_run_dir(plan: Plan) -> tuple[Path, bool]:
    """Return the run directory and whether its run is finished. Raises: ConfigError, CheckpointError."""
    try:
        path = _resolve_run_dir(plan.cfg)
        for name in ("science.json", "finished.json"):
            file = path / name
            if file.exists():
                tree = read_json(file)
                check_science_unchanged(tree.get("science", tree), plan.science_settings(), path)
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
    """Start the next attempt at the run: return the lease on rank 0, its number and start steps on the other ranks.

    None if the previous attempt finished the run after ``_inspect_run_dir``.
    """
    leases: list[Lease] = []

    def acquire() -> Attempt | None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable_dir_error(path, error) from None
        cfg = plan.cfg
        holder = current_holder(world.size, slurm_job_tags())
        try:
            lease = acquire_lease(path, holder, max_attempts_without_progress=cfg.run.max_attempts_without_progress)
        except RestartLoopError as error:
            report_end_without_tracker(path, cfg.tracking, cfg.run.pipeline, "failed", str(error))
            raise
        if (path / "finished.json").exists():
            lease.record_end_and_release("the attempt before has finished the run", 0)
            return None
        leases.append(lease)
        cfg.dump(path / "config.yaml")
        write_json(path / "science.json", plan.science_settings())
        write_json(path / "job.json", slurm_job_tags())
        return Attempt(lease.number, lease.start_steps_by_attempt)

    attempt = world.on_rank0(acquire)
    return leases[0] if leases else attempt


def _build_store(path: Path, plan: Plan, world: World, attempt: Attempt, timeout_seconds: float) -> CheckpointStore:
    return CheckpointStore(
        path / "checkpoints",
        plan.cfg.checkpoint,
        world,
        attempt.number,
        attempt.start_steps_by_attempt,
        is_superseded=attempt.poll_superseded if isinstance(attempt, Lease) else lambda: False,
        write_timeout_seconds=timeout_seconds,
    )


def _record_hang(attempt: Attempt, open_runs: list[Run], reason: str) -> None:
    if isinstance(attempt, Lease):
        attempt.record_end_and_release(reason, TrainingHungError.exit_code)
        for run in open_runs:
            _close_tracker(run, "failed", reason)


def _close_tracker(run: Run, state: AttemptState, reason: str) -> None:
    """Close a run's tracker on rank 0; without an open tracker, report the end unless another attempt took over."""
    if not isinstance(run.tracker, NullTracker):
        run.tracker.close(state, reason)
    elif isinstance(run.attempt, Lease) and not run.attempt.poll_superseded() and not run.is_nested:
        report_end_without_tracker(run.path, run.plan.cfg.tracking, run.plan.cfg.run.pipeline, state, reason)


def _resolve_run_dir(cfg: StageConfig) -> Path:
    """Return the run directory; with run.fresh, the first numbered sibling that is free or that this job created.

    Slurm starts a requeued job with the same command line, so only the job's first start is a fresh one.
    """
    assert cfg.run.dir is not None, "the command line fills it in"
    path = Path(cfg.run.dir)
    if not cfg.run.fresh:
        return path
    job_tags, number = slurm_job_tags(), 1
    while path.exists():
        file = path / "job.json"
        creator = read_json(file).get("slurm_job_id") if file.exists() else None
        if "slurm_restart_count" in job_tags and creator == job_tags["slurm_job_id"]:
            return path
        number += 1
        path = Path(f"{cfg.run.dir}-{number}")
    return path


@contextmanager
def _log_to_file(file: Path) -> Iterator[None]:
    """Copy the log of this rank to a file, with the error that ends the attempt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:  # to this handler only: the caller prints the error on stderr
        record = {
            "name": __name__,
            "levelno": logging.ERROR,
            "levelname": "ERROR",
            "msg": f"stopped by {type(error).__name__}: {error}",
        }
        if not isinstance(error, FovealError) or error.__cause__:
            record["exc_info"] = sys.exc_info()
        handler.handle(logging.makeLogRecord(record))
        raise
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # a full disk, already reported
            handler.close()
