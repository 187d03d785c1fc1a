"""What a start would do, by the functions of a start itself and without writing: begin, resume, refuse, or nothing."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import torch

from foveal.atomic import disk_shortage
from foveal.distributed.world import World
from foveal.errors import CheckpointError
from foveal.slurm import read_slurm_array_task, read_slurm_job
from foveal.training.checkpointing import read_notice_or_refuse
from foveal.training.fork import check_fork_fits
from foveal.training.lease import Attempt, explain_restart_loop, find_next_attempt
from foveal.training.lease_holder import current_holder
from foveal.training.loop import TrainingSetup
from foveal.training.meta_build import build_on_meta, checkpoint_bytes
from foveal.training.plan import Plan, PlanT
from foveal.training.run_directory import inspect_run_dir, open_checkpoints, unusable_dir_error


def preview_start(plan: PlanT, build: Callable[[PlanT, torch.device], TrainingSetup]) -> tuple[PlanT, list[str]]:
    """Return the plan with what it forks from, and lines that say what a start of the plan would do now.

    Also the model is built, on the meta device, where its weights take no memory.
    Raises: as a start does before its first step, where that needs neither other ranks nor a GPU.
    """
    path, is_finished, plan = inspect_run_dir(plan)
    if is_finished:
        return plan, [f"start     {path} was finished before: nothing to do; run.fresh=true starts another beside it"]
    _check_writable(path)
    attempt = _find_next_attempt(plan, path)
    setup = build_on_meta(lambda device: build(plan, device))
    if not plan.has_checkpoints:
        begun = (path / "science.json").exists()
        return plan, [
            f"start     would go on in {path}: what is finished in it is not repeated"
            if begun
            else f"start     new run in {path}"
        ]
    if plan.fork is not None:
        check_fork_fits(plan.fork, setup.model)
    world = World(0, 1, 0, "none", torch.device("cpu"))
    latest = open_checkpoints(path, plan, world, attempt, read_only=True).find_latest_valid()
    if latest is None:
        if shortage := disk_shortage(path, checkpoint_bytes(setup, plan.cfg.optim)):
            raise CheckpointError(shortage)
        step = plan.fork.start_step if plan.fork else 0
        return plan, [f"start     new run in {path}", *_restart_loop_lines(plan, path, attempt, step)]
    folder, state = latest
    plan.check_continues(state.science, folder)
    read_notice_or_refuse(state.save_seconds)
    lines = [
        (
            f"start     would resume from step {state.step} of {plan.total_steps} (attempt {attempt.number} in {path}): "
            f"{folder.name}, written by {state.saved_by}"
        ),
        *_restart_loop_lines(plan, path, attempt, state.step),
    ]
    if shortage := disk_shortage(path, sum(file.stat().st_size for file in folder.iterdir())):
        lines.append(f"beware    {shortage}")
    return plan, lines


def _check_writable(path: Path) -> None:
    """Raise ConfigError if a run directory can be neither made nor written, as far as permissions tell."""
    code = None
    try:
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            code = errno.EEXIST if existing == path.absolute() else errno.ENOTDIR  # as mkdir says
        elif not os.access(existing, os.W_OK | os.X_OK):
            code = errno.EACCES
    except OSError as error:
        code = error.errno
    if code is not None:
        raise unusable_dir_error(path, OSError(code, os.strerror(code)))


def _find_next_attempt(plan: Plan, path: Path) -> Attempt:
    """Return the attempt that a start would be.

    The tasks of a Slurm array share the directory of their run, and wait for its lease: it is no refusal.
    Raises: RunInUseError.
    """
    if read_slurm_array_task() is not None and not plan.has_checkpoints:
        return Attempt(0)
    return find_next_attempt(path, current_holder(plan.world_size, read_slurm_job()))


def _restart_loop_lines(plan: Plan, path: Path, attempt: Attempt, step: int) -> list[str]:
    """Return a line if a start at this step would be refused because too many attempts began there.

    It is no refusal here: only a start records it, after which the starts are counted anew.
    """
    limit = plan.cfg.run.max_attempts_without_progress
    loops = (explain_restart_loop(path, attempt.number, limit, at) for at in (-1, step))
    return [f"beware    the next start will be refused: {loop}" for loop in loops if loop][:1]
