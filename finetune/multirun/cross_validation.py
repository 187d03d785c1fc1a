"""Cross-validation: data.train is split into folds, and each fold evaluates a training on the remaining folds.

Each fold is a run in ``folds/`` of the cross-validation's run directory. Without a Slurm array the folds are nested
runs (nested_runs.py), one after another. With a Slurm array task i of n runs the folds i, i + n, i + 2n, ..., each as
an outermost run with its own lease, so that all tasks work in ``folds/`` at the same time. The task that finds all folds
finished opens the cross-validation's run, writes the aggregated results and delivers the folds to MLflow.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from finetune.checks import check_stopping_uses_holdout
from finetune.config import FinetuneConfig
from finetune.multirun.nested_runs import (
    FitFn,
    NestedRun,
    RunSummary,
    get_run_dir,
    is_finished,
    run_or_reuse_nested,
)
from finetune.plan import nested_run_config, plan_training
from finetune.task import FinetunePlan
from foveal.distributed.world import World
from foveal.errors import ConfigError, LaunchError, RunInUseError
from foveal.slurm import read_slurm_array_task
from foveal.training.run import Run

_METRIC_PREFIXES = ("fold_", "holdout_")
_POLL_SECONDS = 1.0  # between attempts to open the cross-validation's run while another task holds its lease
_log = logging.getLogger("foveal.finetune")


def plan_cross_validation(cfg: FinetuneConfig, world_size: int) -> FinetunePlan:
    """Return the plan of a cross-validation, which has the steps of its first fold.

    The folds of the first repeat are planned, and so checked, before any run starts; other repeats have folds of about
    the same sizes. Raises: ConfigError, DataError, ExportError, LaunchError.
    """
    assert cfg.cross_validation is not None
    _check_cross_validation(cfg)
    plans = [plan_training(fold_cfg, world_size) for fold_cfg in fold_configs(cfg)[: cfg.cross_validation.count]]
    first = plans[0].cfg
    data = cfg.data.model_copy(update={"lanes": first.data.lanes})
    resolved = {"data": data, "model": first.model, "backbone": first.backbone}
    return replace(plans[0], cfg=cfg.model_copy(update=resolved))


def fold_configs(cfg: FinetuneConfig) -> list[FinetuneConfig]:
    """Return the settings of all folds of all repeats, repeat by repeat."""
    assert cfg.cross_validation is not None
    seeds = range(cfg.seed, cfg.seed + cfg.cross_validation.repeats)
    return [_fold_config(cfg, seed, fold) for seed in seeds for fold in range(cfg.cross_validation.count)]


def cross_validate(plan: FinetunePlan, run: Run, fit: FitFn) -> None:
    """Run every unfinished fold, then record the aggregated results. The n-th fold's metrics are logged as step n."""
    summaries: list[RunSummary] = []
    folds = [NestedRun(cfg, _describe_fold(cfg)) for cfg in fold_configs(plan.cfg)]
    for number, summary in enumerate(run_or_reuse_nested(folds, run, fit, "fold"), start=1):
        summaries.append({name: value for name, value in summary.items() if name.startswith(_METRIC_PREFIXES)})
        run.tracker.log_results_once(summaries[-1], number)
    if not run.is_preempted:
        run.mark_finished(summarize_folds(summaries))


def summarize_folds(summaries: Sequence[RunSummary]) -> RunSummary:
    """Return mean, standard deviation, minimum and maximum of each metric over the runs; ``folds`` is their number.

    The standard deviation is the sample's (n - 1). It is the spread of the folds, not the standard error of the mean:
    the trainings share images, and no unbiased estimator of that error exists (Bengio and Grandvalet, JMLR 5, 2004).
    """
    results: RunSummary = {"folds": float(len(summaries))}
    for name in summaries[0]:
        values = [summary[name] for summary in summaries]
        results |= {
            f"{name}_mean": statistics.fmean(values),
            f"{name}_std": statistics.stdev(values),
            f"{name}_lowest": min(values),
            f"{name}_highest": max(values),
        }
    return results


def dispatch_folds(cfg: FinetuneConfig, world: World, execute: Callable[[FinetuneConfig], bool]) -> None:
    """Call ``execute``, which returns whether the run finished, for this job's part of a config.

    Without a Slurm array that is the config itself. A task of an array executes its own folds, then the
    cross-validation if every fold is finished. A task finishes its folds before it checks, so the last task finds all
    of them finished. Several tasks may find that at the same time: the lease of the run directory admits one, and the
    others wait and take over if it dies. Raises: the errors of the plan and of the runs.
    """
    task = read_slurm_array_task()
    if cfg.cross_validation is None or task is None:
        execute(cfg)
        return
    _check_cross_validation(cfg)
    folds = fold_configs(cfg)
    task_folds = list(enumerate(folds, start=1))[task.task_id :: task.task_count]
    if not task_folds:
        _log.info("task %d of the array has nothing to do: there are %d folds", task.task_id, len(folds))
        return
    for number, fold_cfg in task_folds:
        _log.info("fold %d of %d (%s): %s", number, len(folds), _describe_fold(fold_cfg), fold_cfg.run.dir)
        if not execute(fold_cfg):  # preempted: the requeued task goes on
            return
    unfinished = world.on_rank0(lambda: sum(not _is_finished_uncached(fold_cfg) for fold_cfg in folds))
    if unfinished:
        _log.info(
            "%s: %d of %d folds are left to other tasks; the last closes the run", cfg.run.dir, unfinished, len(folds)
        )
        return
    while not _try_aggregate(cfg, execute):
        time.sleep(_POLL_SECONDS)


def _try_aggregate(cfg: FinetuneConfig, execute: Callable[[FinetuneConfig], bool]) -> bool:
    """Execute the cross-validation's run; return False if another task holds its lease."""
    try:
        execute(cfg)
    except RunInUseError:
        return False
    return True


def _is_finished_uncached(cfg: FinetuneConfig) -> bool:
    """Return whether a run is finished according to the file server, not to this node's cache.

    An NFS client may cache for a minute that a file does not exist, unless this node changes the folder. Otherwise two
    tasks that finish at the same time would each miss the other's last fold, and neither would aggregate.
    """
    for folder in (get_run_dir(cfg).parent, get_run_dir(cfg)):
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            pass
    return is_finished(cfg)


def _fold_config(cfg: FinetuneConfig, seed: int, fold: int) -> FinetuneConfig:
    assert cfg.cross_validation is not None
    changes = {"seed": seed, "data.fold": {"of": cfg.cross_validation.count, "number": fold}}
    return nested_run_config(cfg, f"folds/seed{seed}-fold{fold}", changes)


def _describe_fold(cfg: FinetuneConfig) -> str:
    """Return what tells a fold from the others; folds are numbered from 0, as in the names of their directories."""
    return get_run_dir(cfg).name.replace("-", ", ")


def _check_cross_validation(cfg: FinetuneConfig) -> None:
    """Raise ConfigError for an unsuitable early stopping, LaunchError for unsuitable task ids of a Slurm array."""
    check_stopping_uses_holdout(cfg, "a fold")
    task = read_slurm_array_task()
    if task is None:
        return
    if cfg.run.fresh:
        raise ConfigError(
            "run.fresh=true and a Slurm array exclude each other: its tasks share one directory; set run.dir to a new "
            "one"
        )
    if (task.min_task_id, task.max_task_id) != (0, task.task_count - 1):
        raise LaunchError(
            f"the array has {task.task_count} tasks with numbers from {task.min_task_id} to {task.max_task_id}, and "
            f"folds are assigned by number: use --array=0-{task.task_count - 1}, also to repeat a task (finished folds "
            f"are not run again)"
        )
