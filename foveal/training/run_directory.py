"""The run directory of an attempt: open it, execute the attempt, and record its end on every exit path."""

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from foveal import __version__
from foveal.atomic import read_json, write_json
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.peer_failure import describe_peer_failure, diagnose_launch_mistake
from foveal.distributed.preemption import Preemption
from foveal.distributed.watchdog import Watchdog, run_watchdog
from foveal.distributed.world import World, describe_rank
from foveal.errors import (
    AttemptSupersededError,
    ConfigError,
    FovealError,
    RestartLoopError,
    TrainingDivergedError,
    TrainingHungError,
)
from foveal.redact import redact
from foveal.renames import translate_science
from foveal.slurm import read_slurm_job, slurm_job_tags
from foveal.tracking import report_end_without_tracker
from foveal.tracking.tracker import AttemptState, NullTracker
from foveal.training.auto_settings import decide_auto_settings
from foveal.training.config import StageConfig
from foveal.training.config_mistakes import refuse_run_of_other_stage
from foveal.training.data_workers import open_workers
from foveal.training.fork import begin_fork, plan_fork
from foveal.training.fork_source import parse_fork
from foveal.training.lease import Attempt, Lease, acquire_lease
from foveal.training.lease_holder import current_holder
from foveal.training.lineage import Fork
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.node_log import open_node_log
from foveal.training.out_of_memory import diagnose_out_of_memory
from foveal.training.plan import Plan, PlanT
from foveal.training.rank_log import log_to_file
from foveal.training.report import log_report
from foveal.training.run import Run
from foveal.training.stage import ConfigT

_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}  # a retry fails in the same way
_log = logging.getLogger(__name__)


@contextmanager
def open_run(
    stage_name: str, plan: Plan, world: World, preemption: Preemption, *, outer_run: Run | None = None
) -> Iterator[Run | None]:
    """Open the run directory and yield the run; yield None if the run is finished already.

    ``outer_run``: the run that contains this one, whose watchdog and progress bar this one then shares.
    Raises: ConfigError if the directory cannot exist, CheckpointError if it holds a run of other science,
    RunInUseError if another process writes it, RestartLoopError if the previous attempts made no progress,
    TrainingHungError if a rank is lost, OutOfMemoryError if memory does not suffice, LaunchError if NCCL refuses a group.
    """
    # Rank 0 only: file systems show changes late.
    path, is_finished = world.on_rank0(lambda: inspect_run_dir(plan)[:2])
    if is_finished:
        if world.rank == 0 and outer_run is None:
            _log.info("%s is finished already; run.fresh=true starts another beside it", path)
            log_report(stage_name, path, plan.cfg)
        yield None
        return
    # The resolved directory goes into config.yaml, and trials derive their folders from it.
    run_cfg = plan.cfg.run.model_copy(update={"dir": str(path), "fresh": False})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"run": run_cfg}))
    attempt, fork = _acquire_attempt(path, plan, world)
    if attempt is None:
        yield None
        return
    plan = plan.with_fork(fork) if fork else plan
    end, open_runs, logs = _AttemptEnd(), list[Run](), path / "logs"
    timeout = plan.cfg.engine.timeout_minutes * 60
    with ExitStack() as stack:
        stack.enter_context(log_to_file(logs / f"rank-{world.rank:03d}.log"))
        _log.log(logging.DEBUG if outer_run else logging.INFO, "foveal %s, %s", __version__, describe_rank(world))
        if isinstance(attempt, Lease):
            stack.callback(lambda: attempt.record_end_and_release(end.reason, end.exit_code, end.step))
        on_hang = partial(_record_hang, attempt, open_runs)
        watchdog = outer_run.watchdog if outer_run else stack.enter_context(run_watchdog(world, logs, timeout, on_hang))
        try:
            store = open_checkpoints(path, plan, world, attempt)
            plan = decide_auto_settings(plan, store, world)  # before anything reads the engine's settings
            saver = CheckpointSaver(store, is_superseded=attempt.poll_superseded, write_timeout_seconds=timeout / 2)
            meter = StragglerMeter(world.device, socket.gethostname())
            run = Run(stage_name, path, plan, world, preemption, attempt, store, watchdog, saver, meter)
            if outer_run:
                run.outer_progress, run.outer_tracker = outer_run.progress, outer_run.tracker
            run.workers = stack.enter_context(open_workers(plan, world, outer_run))
            open_runs.append(run)
            stack.callback(lambda: _close_tracker(run, end.state, end.reason))
            stack.callback(run.close)
            run.node_log = open_node_log(path, world, plan.cfg.log)  # run.close ends it
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
    """Return OutOfMemoryError, LaunchError or TrainingHungError in place of a library's error, else the error itself."""
    out_of_memory = diagnose_out_of_memory(error, stage_name, plan)
    if out_of_memory is not None:  # first, because NCCL's out-of-memory error looks like a lost peer
        return out_of_memory
    if isinstance(error, FovealError):
        return error
    if (mistake := diagnose_launch_mistake(error)) is not None:
        return mistake
    if peer_failure := describe_peer_failure(error):
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
        self.exit_code, self.reason = 0, run.end_reason or _describe_end(run)
        self.state = "finished" if run.is_finished else "saved-and-left"


def _describe_end(run: Run) -> str:
    """Return why an attempt that nothing interrupted ended: finished, perhaps early, or at run.stop_at_step."""
    total = run.plan.total_steps
    if run.is_finished:
        return f"finished early, at step {run.step} of {total}" if 0 < run.step < total else "finished"
    return f"reached step {run.step} of {total} (run.stop_at_step)" if run.step else "left before its end"


def inspect_run_dir(plan: PlanT) -> tuple[Path, bool, PlanT]:
    """Return the run directory, whether its run is finished, and the plan with what it forks from, if it does.

    Nothing is written. Raises: ConfigError, CheckpointError.
    """
    try:
        path = _resolve_run_dir(plan.cfg)
        plan = plan_fork(plan, path)
        if plan.fork is not None and plan.fork.checkpoint is not None:
            return path, False, plan  # nothing has been trained here
        for name in ("science.json", "finished.json"):
            file = path / name
            if file.exists():
                tree = read_json(file)
                plan.check_continues(tree.get("science", tree), path)
        return path, (path / "finished.json").exists(), plan
    except OSError as error:
        if error.errno not in _PERMANENT_ERRNOS:
            raise
        raise unusable_dir_error(plan.cfg.run.dir, error) from None


def is_run_begun(cfg: StageConfig) -> bool:
    """Return whether the directory of these settings, or of the run that contains it, holds a run.

    A directory that cannot be read holds none.
    """
    if cfg.run.dir is None:
        return False
    with suppress(OSError):
        path = _resolve_run_dir(cfg)
        outer = [path.parents[1]] if path.parent.name in ("trials", "folds") else []
        return any((folder / "science.json").exists() for folder in (path, *outer))
    return False


def keep_rules_of_run(cfg: ConfigT, world: World | None = None) -> ConfigT:
    """Return the settings with which an existing run continues: without change for a new run.

    A run that was made without a setting keeps what its version did (``Config.keep_neutral_values``). Folds of a Slurm
    array exist before the run that they belong to, so they speak for it; a fork that has not begun goes on by the rules
    of its source. With ``world`` rank 0 reads the run, and every rank keeps its own paths.
    Raises: ConfigError, CheckpointError.
    """
    # Rank 0 only: file systems show changes late.
    found = _read_begun_science(cfg) if world is None else world.on_rank0(lambda: _read_begun_science(cfg))
    if found is None:
        return cfg
    source, saved = found
    if cfg.run.fork is None or source != parse_fork(cfg.run.fork)[0]:  # a fork's source has a sentence of its own
        refuse_run_of_other_stage(cfg, source, saved)
    current = cfg.science_settings()
    kept = cfg.keep_neutral_values(translate_science(saved, current))
    if kept is not cfg:
        names = [f"{name}={value}" for name, value in kept.science_settings().items() if value != current.get(name)]
        _log.info("%s was begun before these settings and keeps: %s", source, ", ".join(names))
    return kept


def _read_begun_science(cfg: StageConfig) -> tuple[Path, dict[str, Any]] | None:
    """Return the run whose rules a run goes on by, and its science; None for a new run."""
    try:
        path = _resolve_run_dir(cfg)
        files = [path / "science.json", *path.glob("folds/*/science.json")]
        if cfg.run.fork is not None:
            files.append(parse_fork(cfg.run.fork)[0] / "science.json")
        file = next((file for file in files if file.exists()), None)
        saved = None if file is None else read_json(file)
    except OSError as error:
        raise unusable_dir_error(cfg.run.dir, error) from None
    return None if file is None or not isinstance(saved, dict) else (file.parent, saved)


def unusable_dir_error(path: Path | str | None, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir={path} cannot be a run directory ({error.strerror}); set run.dir to a place that can be written"
    )


def _acquire_attempt(path: Path, plan: Plan, world: World) -> tuple[Attempt | None, Fork | None]:
    """Start the next attempt at the run: return the lease on rank 0, its number and start steps on the other ranks.

    With it the run's beginning in another run, if it is a fork. The attempt is None if the previous attempt finished
    the run after ``inspect_run_dir``.
    """
    leases: list[Lease] = []

    def acquire() -> tuple[Attempt | None, Fork | None]:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable_dir_error(path, error) from None
        cfg = plan.cfg
        holder = current_holder(world.size, read_slurm_job())
        try:
            lease = acquire_lease(path, holder, max_attempts_without_progress=cfg.run.max_attempts_without_progress)
        except RestartLoopError as error:
            report_end_without_tracker(path, cfg.tracking, cfg.run.pipeline, "failed", str(error))
            raise
        if (path / "finished.json").exists():
            lease.record_end_and_release("the attempt before has finished the run", 0)
            return None, None
        try:
            forked = begin_fork(plan, path)
        except FovealError as error:
            lease.record_end_and_release(str(error), error.exit_code)
            raise
        leases.append(lease)
        cfg.dump(path / "config.yaml")
        write_json(path / "science.json", forked.science_settings())
        write_json(path / "job.json", slurm_job_tags())
        return Attempt(lease.number, lease.start_steps_by_attempt), forked.fork

    attempt, fork = world.on_rank0(acquire)
    return leases[0] if leases else attempt, fork


def open_checkpoints(
    path: Path, plan: Plan, world: World, attempt: Attempt, *, read_only: bool = False
) -> CheckpointStore:
    """Open the checkpoints of a run for an attempt. Every rank calls it."""
    return CheckpointStore(
        path / "checkpoints",
        plan.cfg.checkpoint,
        world,
        attempt.number,
        attempt.start_steps_by_attempt,
        first_step=plan.fork.highest_start_step if plan.fork else 0,
        read_only=read_only,
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
    job, number = read_slurm_job(), 1
    while path.exists():
        file = path / "job.json"
        creator = read_json(file).get("slurm_job_id") if file.exists() else None
        if job is not None and job.restart_count and creator == job.job_id:
            return path
        number += 1
        path = Path(f"{cfg.run.dir}-{number}")
    return path
