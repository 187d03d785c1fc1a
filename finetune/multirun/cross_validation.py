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

from finetune.checks import check_blind
from finetune.config import FinetuneConfig
from finetune.multirun.nested_runs import Fit, Summary, each_of, folder_of, is_finished
from finetune.plan import FinetunePlan, inner
from finetune.plan import plan as plan_of
from foveal.distributed.world import World, array_task
from foveal.errors import ConfigError, Held, LaunchError
from foveal.training.run import Run

_JUDGED = ("fold_", "holdout_")
_WAIT = 1.0  # seconds between two looks whether another task has closed the run
_log = logging.getLogger("foveal.finetune")


def plan(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    """The plan of a cross-validation, which has the steps of its first fold.

    Everything that can be refused is refused before a run begins, for every fold: the repeats cut folds of like sizes.
    Errors: ConfigError, DataError, ExportError, LaunchError.
    """
    assert cfg.folds is not None
    _check(cfg)
    first, *_ = [plan_of(one, ranks) for one in runs_of(cfg)[: cfg.folds.count]]
    return replace(first, cfg=cfg)


def runs_of(cfg: FinetuneConfig) -> list[FinetuneConfig]:
    """The settings of every fold of every repeat, in this order."""
    assert cfg.folds is not None
    seeds = range(cfg.seed, cfg.seed + cfg.folds.repeats)
    return [_fold(cfg, seed, number) for seed in seeds for number in range(cfg.folds.count)]


def cross_validate(plan: FinetunePlan, run: Run, fit: Fit) -> None:
    """Run every fold that is not finished, then write down what they come to.

    The numbers of the n-th run are a row of their own at step n.
    """
    found: list[Summary] = []
    for number, summary in enumerate(each_of(runs_of(plan.cfg), run, fit), start=1):
        found.append({name: value for name, value in summary.items() if name.startswith(_JUDGED)})
        run.tracker.results(found[-1], number)
    if not run.left:
        run.finish(spread(found))


def spread(found: Sequence[Summary]) -> Summary:
    """Of each number its mean, standard deviation, lowest and highest over the runs; ``folds``: how many runs.

    The deviation is that of a sample (n - 1). It says how much folds differ, not how far the mean may be off: trainings
    share their images, and there is no unbiased estimator of that (Bengio and Grandvalet, JMLR 5, 2004).
    """
    results: Summary = {"folds": float(len(found))}
    for name in found[0]:
        values = [each[name] for each in found]
        results |= {
            f"{name}_mean": statistics.fmean(values),
            f"{name}_std": statistics.stdev(values),
            f"{name}_lowest": min(values),
            f"{name}_highest": max(values),
        }
    return results


def divide(cfg: FinetuneConfig, world: World, run: Callable[[FinetuneConfig], bool]) -> None:
    """Do with ``run``, which says whether it came to an end, what of a config is this job's.

    That is all of it, but for a task of an array its own folds, and then the whole if every fold is finished. A fold is
    finished before its task looks, so the last one finds all of them. Two may find that at once: the directory's lease
    lets one in, and the other waits, to take over from it if it dies. Errors: those of ``plan`` and of the runs.
    """
    task = array_task()
    if cfg.folds is None or task is None:
        run(cfg)
        return
    _check(cfg)
    folds = runs_of(cfg)
    mine = folds[task.number :: task.count]
    if not mine:
        _log.info("task %d of the array has nothing to do: there are %d folds", task.number, len(folds))
        return
    if not all(run(one) for one in mine):  # it was asked to leave, and the rest waits for its next start
        return
    left = world.once(lambda: sum(not _is_finished_now(one) for one in folds))
    if left:
        _log.info("%s: %d of %d folds are left to other tasks; the last closes the run", cfg.run.dir, left, len(folds))
        return
    while not _closed(cfg, run):
        time.sleep(_WAIT)


def _closed(cfg: FinetuneConfig, run: Callable[[FinetuneConfig], bool]) -> bool:
    """Close the run of the whole, unless another task is about to."""
    try:
        run(cfg)
    except Held:
        return False
    return True


def _is_finished_now(cfg: FinetuneConfig) -> bool:
    """Whether a run is finished, as the file system's server knows it.

    NFS may answer from memory for a minute, also that there is no such file, unless this node changes the folder: two
    tasks that finish at the same time would each miss the other's last fold, and neither would close the run.
    """
    for folder in (folder_of(cfg).parent, folder_of(cfg)):
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            pass
    return is_finished(cfg)


def _fold(cfg: FinetuneConfig, seed: int, number: int) -> FinetuneConfig:
    assert cfg.folds is not None
    changes = {"seed": seed, "data.fold": {"of": cfg.folds.count, "number": number}}
    return inner(cfg, f"folds/seed{seed}-fold{number}", changes)


def _check(cfg: FinetuneConfig) -> None:
    """Refuse settings that folds cannot have, and arrays that cannot share them. Errors: ConfigError, LaunchError."""
    if cfg.trials is not None:
        raise ConfigError("folds and trials exclude each other: cross-validate the arm that a comparison has chosen")
    if cfg.run.stop_at is not None:
        raise ConfigError(
            "run.stop_at and folds exclude each other: a cross-validation is of whole runs; shorten epochs"
        )
    if cfg.data.fold is not None:
        raise ConfigError("data.fold and folds exclude each other: folds trains on every fold in turn; leave one out")
    check_blind(cfg, "a fold")
    task = array_task()
    if task is None:
        return
    if cfg.run.fresh:
        raise ConfigError(
            "run.fresh=true and a Slurm array exclude each other: its tasks share one directory; set run.dir to a new one"
        )
    if (task.lowest, task.highest) != (0, task.count - 1):
        raise LaunchError(
            f"the array has {task.count} tasks with numbers from {task.lowest} to {task.highest}, and folds are shared by "
            f"number: use --array=0-{task.count - 1}, also to repeat a task (what is finished is not run again)"
        )
