"""Forks: a new run that begins in a checkpoint of another run, under other science (``run.fork=RUN`` or ``RUN@STEP``).

The source is another run's directory, perhaps of a run in progress, which may remove the checkpoint at any time. So the
first attempt hard-links the checkpoint's files into ``RUN/fork/`` and reads them there. Until the fork has saved its own
first checkpoint, each start forks again and science is not compared, because nothing has been trained; afterwards the
fork resumes like any run and never looks at the source.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from foveal.atomic import atomic_folder, read_json, sha256
from foveal.checkpoint.chunk_index import ChunkIndex, check_weights_fit, load_chunks
from foveal.checkpoint.digests import verify_checksums
from foveal.checkpoint.state import TrainState, read_train_state
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, ConfigError
from foveal.renames import translate_science
from foveal.training.evaluations import Metric, find_best_step
from foveal.training.fork_source import find_source, list_checkpoints, parse_fork
from foveal.training.lineage import Fork, read_fork, write_fork
from foveal.training.plan import PlanT

# Science under which an evaluation may give other numbers for the same weights.
_EVALUATION_SECTIONS = ("task", "data", "inherited", "segment", "detect")
_TRAINING_ONLY_PREFIX = "data.augment."
_HELD = "fork"  # folder of the linked checkpoint, in the fork's run directory
_MAX_TRIES = 5  # of linking a checkpoint before its run removes it
_log = logging.getLogger(__name__)


def plan_fork(plan: PlanT, run_dir: Path) -> PlanT:
    """Return the plan of a run that forks or was forked; any other plan unchanged. For rank 0, or without ranks.

    Raises: ConfigError, CheckpointError if the source cannot be forked from or the run is another one's fork;
    StorageUnreachableError.
    """
    setting, recorded = plan.cfg.run.fork, read_fork(run_dir)
    if _has_begun(run_dir):
        _check_is_fork_of(setting, recorded, run_dir)
        return plan if recorded is None else plan.with_fork(recorded)
    if setting is None:
        return plan
    fork, saved_science = _reuse_held_checkpoint(setting, recorded, run_dir) or find_source(setting, run_dir, plan.cfg)
    current = plan.with_fork(fork).science_settings()
    saved = plan.cfg.neutral_values() | translate_science(saved_science, current)
    differences = _compare_science(saved, current)
    fork = replace(fork, differences=differences)
    start = fork.step if fork.has_same_order else 0
    if start >= plan.total_steps:
        raise ConfigError(
            f"run.fork={setting}: the checkpoint is of step {fork.step}, and this run has {plan.total_steps} steps, "
            f"which leaves none to train: raise epochs, or name an earlier step with run.fork=RUN@STEP"
        )
    highest = max(start, recorded.highest_start_step if recorded else 0)
    return plan.with_fork(replace(fork, start_step=start, highest_start_step=highest))


def begin_fork(plan: PlanT, run_dir: Path) -> PlanT:
    """Return the plan as ``plan_fork``, after recording the fork and linking its checkpoint. For rank 0, with the lease.

    Raises: as ``plan_fork``.
    """
    for _ in range(_MAX_TRIES):
        forked = plan_fork(plan, run_dir)
        fork = forked.fork
        if fork is None:
            return forked
        if fork.checkpoint is None:
            release_checkpoint(run_dir)  # a kill may have left it
            return forked
        try:
            fork = replace(fork, checkpoint=_hold_checkpoint(fork.checkpoint, run_dir))
        except FileNotFoundError:
            _log.info("%s was removed by its run; looking for the newest checkpoint again", fork.checkpoint)
            continue
        write_fork(run_dir, fork)
        return replace(forked, fork=fork)
    raise CheckpointError(
        f"run.fork={plan.cfg.run.fork}: the run removes its checkpoints faster than they can be read; raise its "
        f"checkpoint.keep, or name a step that checkpoint.keep_every keeps"
    )


def load_fork(
    fork: Fork,
    selection_metric: Metric | None,
    engine: Engine,
    world: World,
    adopt_best: Callable[[Path, int], bool],
) -> TrainState:
    """Load the source's checkpoint into an engine, whatever engine and world size wrote it; every rank calls it.

    Moments are loaded if the optimizer is the same for every parameter, else they start fresh. Returns the fork's
    training state: its first step, and of the source's skipped batches, evaluations and seconds those that apply.
    ``adopt_best`` copies a run's weights of the best evaluation and returns whether they were there.
    Raises: CheckpointError, on every rank, for a torn checkpoint or a parameter that does not fit.
    """
    folder = fork.checkpoint
    assert folder is not None, "a fork with its own checkpoint resumes"
    if not verify_checksums(folder, world):
        raise CheckpointError(world.on_rank0(lambda: _explain_unreadable(fork)))
    state = world.on_rank0(lambda: read_train_state(folder))
    chunks = engine.state_chunks()
    index = world.on_rank0(lambda: ChunkIndex.read(folder))
    parts = index.parts_by_name()
    same_moments = not fork.differs_in(["optim.name"]) and all(
        parts.get(chunk.name, chunk.flat_views_by_part.keys()) == chunk.flat_views_by_part.keys() for chunk in chunks
    )
    world.run_all_or_raise(
        lambda: _as_fork_error(fork, lambda: load_chunks(folder, chunks, index, weights_only=not same_moments))
    )
    engine.on_state_loaded(state.updates if same_moments else 0)
    _log.info("forked from step %d of %s, which %s wrote", fork.step, fork.run, state.saved_by)
    if not same_moments:
        _log.info("the optimizer is another one, or has other parameters: its moments start at zero")
    if not fork.has_same_order:
        return replace(state, step=0, skipped=[], scores={}, seconds=0.0, save_seconds=0.0)
    scores = (
        state.scores if world.on_rank0(lambda: _do_evaluations_apply(fork, state, selection_metric, adopt_best)) else {}
    )
    return replace(state, scores=scores, save_seconds=0.0)


def check_fork_fits(fork: Fork, model: nn.Module) -> None:
    """Raise CheckpointError if the source's checkpoint has other parameters than a model, perhaps on the meta device."""
    if fork.checkpoint is not None:
        checkpoint = fork.checkpoint
        _as_fork_error(fork, lambda: check_weights_fit(checkpoint, model.state_dict()))


def release_checkpoint(run_dir: Path) -> None:
    """Remove the linked checkpoint of the source. For rank 0, once the run has a checkpoint of its own."""
    shutil.rmtree(run_dir / _HELD, ignore_errors=True)


# --- the run's own directory ---


def _has_begun(run_dir: Path) -> bool:
    """Return whether a run has a checkpoint of its own, or is finished."""
    return (run_dir / "finished.json").exists() or bool(list_checkpoints(run_dir))


def _check_is_fork_of(setting: str | None, recorded: Fork | None, run_dir: Path) -> None:
    """Raise CheckpointError if a run that has begun is not a fork of what run.fork names."""
    file = run_dir / "science.json"
    if recorded is None and file.exists() and "inherited.fork" in read_json(file):
        raise CheckpointError(f"{run_dir} is a fork, and its fork.json is gone: restore it")
    if setting is None:
        return
    if recorded is None:
        raise CheckpointError(
            f"{run_dir} holds a run that is no fork, and run.fork={setting} would begin another; give the fork its own "
            f"run.dir, or run.fresh=true"
        )
    source, step = parse_fork(setting)
    if setting != recorded.setting and (str(source) != recorded.run or step not in {None, recorded.step}):
        raise CheckpointError(
            f"{run_dir} is a fork of {recorded.run}, step {recorded.step}, and run.fork={setting} names another; set it "
            f"back or leave it out to continue, or give the new fork its own run.dir, or run.fresh=true"
        )


def _reuse_held_checkpoint(setting: str, recorded: Fork | None, run_dir: Path) -> tuple[Fork, dict[str, Any]] | None:
    """Return the fork of a killed attempt whose linked checkpoint is still there, so that every try begins alike.

    With it the science of the source; None without such a checkpoint.
    """
    if recorded is None or recorded.setting != setting:
        return None
    for held in (run_dir / _HELD).glob("step-*"):
        with suppress(OSError):
            if sha256(held / "checksums.json") == recorded.digest:
                return replace(recorded, checkpoint=held), read_train_state(held).science
    return None


def _compare_science(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the science that differs, name to [was, is]; ancestors themselves are no difference."""
    names = sorted((saved.keys() | current.keys()) - {"inherited.fork"})
    return {name: [saved.get(name), current.get(name)] for name in names if saved.get(name) != current.get(name)}


def _hold_checkpoint(checkpoint: Path, run_dir: Path) -> Path:
    """Hard-link a checkpoint's files into the run directory, and return the folder to read.

    It is the source's own folder where links are impossible, as across file systems. Raises: FileNotFoundError if the
    checkpoint's run has removed it.
    """
    held = run_dir / _HELD / checkpoint.name
    if checkpoint == held:
        return held
    release_checkpoint(run_dir)
    try:
        held.parent.mkdir()
        with atomic_folder(held) as draft:
            for file in checkpoint.iterdir():
                (draft / file.name).hardlink_to(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        _log.info("%s is read in its place, because it cannot be linked (%s)", checkpoint, error.strerror)
        release_checkpoint(run_dir)
        return checkpoint
    return held


# --- loading ---


def _explain_unreadable(fork: Fork) -> str:
    """Return why the source's checkpoint is not as its checksums say: removed by its run meanwhile, or torn."""
    assert fork.checkpoint is not None
    other = "name another step with run.fork=RUN@STEP"
    if not (fork.checkpoint / "checksums.json").exists():
        return f"run.fork: {fork.run} removed its checkpoint of step {fork.step} meanwhile; start again, or {other}"
    return f"run.fork: the checkpoint of step {fork.step} of {fork.run} is torn or corrupt; {other}"


def _as_fork_error(fork: Fork, load: Callable[[], None]) -> None:
    try:
        load()
    except CheckpointError as error:
        raise CheckpointError(f"run.fork={fork.setting} keeps the shapes of the run it begins from: {error}") from None


def _do_evaluations_apply(
    fork: Fork, state: TrainState, metric: Metric | None, adopt_best: Callable[[Path, int], bool]
) -> bool:
    """Return whether the source's evaluations count in the fork, after copying the weights of the best one."""
    differing = [name for name in fork.differs_in(_EVALUATION_SECTIONS) if not name.startswith(_TRAINING_ONLY_PREFIX)]
    if not state.scores or differing:
        return False
    if metric is None:
        return True
    if any(metric.name not in scores for scores in state.scores.values()):
        return False
    best = find_best_step(state.scores, metric)
    if adopt_best(Path(fork.run), best):
        return True
    _log.warning(
        "the evaluations of %s do not count here: the weights of its best one, of step %d, are gone", fork.run, best
    )
    return False
