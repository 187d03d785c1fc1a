"""Cross-validation: data.train is cut into folds, and each is once what a training on the others is judged on.

Every fold is an ordinary run in ``folds/`` of the cross-validation's run directory. Without a Slurm array they are runs
inside a run (several.py), one after another. The tasks of an array share them: fold i is task i mod count's, an outermost
run with a lease and an MLflow-less life of its own, so that any number of tasks is at work in ``folds/`` at once. The run
of the whole, which finds all its folds finished and writes down what they come to, is whoever's who sees the last one.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from finetune.checks import check_holdout_stopping
from finetune.config import FinetuneConfig
from finetune.multirun.nested_runs import FitFn, RunSummary, get_run_dir, is_finished, run_nested
from finetune.plan import FinetunePlan, nested_run_config
from finetune.plan import plan_training as plan_of
from foveal.distributed.world import World, read_slurm_array_task
from foveal.errors import ConfigError, LaunchError, RunInUseError
from foveal.training.run import Run

_METRIC_PREFIXES = ("fold_", "holdout_")
_POLL_SECONDS = 1.0  # seconds between two looks whether another task has closed the run
_log = logging.getLogger("foveal.finetune")


def plan_cross_validation(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    """The plan of a cross-validation, which has the steps of its first fold.

    Everything that can be refused is refused before a run begins, for every fold: the repeats cut folds of like sizes.
    Raises: ConfigError, DataError, ExportError, LaunchError.
    """
    assert cfg.folds is not None
    _check_cross_validation(cfg)
    first, *_ = [plan_of(one, ranks) for one in fold_configs(cfg)[: cfg.folds.count]]
    return replace(first, cfg=cfg)


def fold_configs(cfg: FinetuneConfig) -> list[FinetuneConfig]:
    """The settings of every fold of every repeat, in this order."""
    assert cfg.folds is not None
    seeds = range(cfg.seed, cfg.seed + cfg.folds.repeats)
    return [_fold_config(cfg, seed, number) for seed in seeds for number in range(cfg.folds.count)]


def cross_validate(plan: FinetunePlan, run: Run, fit: FitFn) -> None:
    """Run every fold that is not finished, then write down what they come to.

    The numbers of the n-th run are a row of their own at step n.
    """
    found: list[RunSummary] = []
    for number, summary in enumerate(run_nested(fold_configs(plan.cfg), run, fit), start=1):
        found.append({name: value for name, value in summary.items() if name.startswith(_METRIC_PREFIXES)})
        run.tracker.log_results(found[-1], number)
    if not run.is_preempted:
        run.mark_finished(summarize_folds(found))


def summarize_folds(summaries: Sequence[RunSummary]) -> RunSummary:
    """Of each number its mean, standard deviation, lowest and highest over the runs; ``folds``: how many runs.

    The deviation is that of a sample (n - 1). It says how much folds differ, not how far the mean may be off: trainings
    share their images, and there is no unbiased estimator of that (Bengio and Grandvalet, JMLR 5, 2004).
    """
    results: RunSummary = {"folds": float(len(summaries))}
    for name in summaries[0]:
        values = [each[name] for each in summaries]
        results |= {
            f"{name}_mean": statistics.fmean(values),
            f"{name}_std": statistics.stdev(values),
            f"{name}_lowest": min(values),
            f"{name}_highest": max(values),
        }
    return results


def dispatch_folds(cfg: FinetuneConfig, world: World, execute: Callable[[FinetuneConfig], bool]) -> None:
    """Do with ``run``, which says whether it came to an end, what of a config is this job's.

    That is all of it, but for a task of an array its own folds, and then the whole if every fold is finished. A fold is
    finished before its task looks, so the last one finds all of them. Two may find that at once: the directory's lease
    lets one in, and the other waits, to take over from it if it dies. Raises: those of ``plan`` and of the runs.
    """
    task = read_slurm_array_task()
    if cfg.folds is None or task is None:
        execute(cfg)
        return
    _check_cross_validation(cfg)
    folds = fold_configs(cfg)
    mine = folds[task.task_id :: task.task_count]
    if not mine:
        _log.info("task %d of the array has nothing to do: there are %d folds", task.task_id, len(folds))
        return
    if not all(execute(one) for one in mine):  # it was asked to leave, and the rest waits for its next start
        return
    left = world.on_rank0(lambda: sum(not _is_finished_uncached(one) for one in folds))
    if left:
        _log.info("%s: %d of %d folds are left to other tasks; the last closes the run", cfg.run.dir, left, len(folds))
        return
    while not _try_aggregate(cfg, execute):
        time.sleep(_POLL_SECONDS)


def _try_aggregate(cfg: FinetuneConfig, execute: Callable[[FinetuneConfig], bool]) -> bool:
    """Close the run of the whole, unless another task is about to."""
    try:
        execute(cfg)
    except RunInUseError:
        return False
    return True


def _is_finished_uncached(cfg: FinetuneConfig) -> bool:
    """Whether a run is finished, as the file system's server knows it.

    NFS may answer from memory for a minute, also that there is no such file, unless this node changes the folder: two
    tasks that finish at the same time would each miss the other's last fold, and neither would close the run.
    """
    for folder in (get_run_dir(cfg).parent, get_run_dir(cfg)):
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            pass
    return is_finished(cfg)


def _fold_config(cfg: FinetuneConfig, seed: int, fold: int) -> FinetuneConfig:
    assert cfg.folds is not None
    changes = {"seed": seed, "data.fold": {"of": cfg.folds.count, "number": fold}}
    return nested_run_config(cfg, f"folds/seed{seed}-fold{fold}", changes)


def _check_cross_validation(cfg: FinetuneConfig) -> None:
    """Refuse settings that folds cannot have, and arrays that cannot share them. Raises: ConfigError, LaunchError."""
    if cfg.trials is not None:
        raise ConfigError("folds and trials exclude each other: cross-validate the arm that a comparison has chosen")
    if cfg.run.stop_at is not None:
        raise ConfigError(
            "run.stop_at and folds exclude each other: a cross-validation is of whole runs; shorten epochs"
        )
    if cfg.data.fold is not None:
        raise ConfigError("data.fold and folds exclude each other: folds trains on every fold in turn; leave one out")
    check_holdout_stopping(cfg, "a fold")
    task = read_slurm_array_task()
    if task is None:
        return
    if cfg.run.fresh:
        raise ConfigError(
            "run.fresh=true and a Slurm array exclude each other: its tasks share one directory; set run.dir to a new one"
        )
    if (task.min_task_id, task.max_task_id) != (0, task.task_count - 1):
        raise LaunchError(
            f"the array has {task.task_count} tasks with numbers from {task.min_task_id} to {task.max_task_id}, and folds are shared by "
            f"number: use --array=0-{task.task_count - 1}, also to repeat a task (what is finished is not run again)"
        )
