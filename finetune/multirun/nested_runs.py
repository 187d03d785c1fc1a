"""Runs inside a run, in one process: each has a place in the outer run's directory and all that a run has.

It resumes, and it is not repeated once finished. What the outer run is about (trials.py, folds.py) decides which runs
there are and what their numbers come to.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune.config import FinetuneConfig
from finetune.plan import FinetunePlan
from finetune.plan import plan_training as plan_of
from foveal.data.sampling.subset import eval_split
from foveal.training.run import Run
from foveal.training.run_directory import open_run

FitFn = Callable[[FinetunePlan, Run], None]
RunSummary = dict[str, float]


def run_nested(configs: Sequence[FinetuneConfig], outer_run: Run, fit: FitFn) -> Iterator[RunSummary]:
    """Run what is not finished, and give the summary of each in turn; fewer where the run was asked to leave (``left``).

    The outer run's steps are the runs that are finished: an attempt that adds one has got further.
    """
    outer_run.start_attempt(sum(is_finished(cfg) for cfg in configs), total_steps=len(configs))
    for done, cfg in enumerate(configs, start=1):
        summary = _run_or_read_summary(plan_of(cfg, outer_run.world.size), outer_run, fit)
        if summary is None:
            outer_run.end_preempted(done - 1)
            return
        on = f"{eval_split(cfg.data).metric_prefix}_"
        told = next((f", {name} {value:.3f}" for name, value in summary.items() if name.startswith(on)), "")
        outer_run.progress.update(done, f"{get_run_dir(cfg).name}{told}")
        yield summary


def get_run_dir(cfg: FinetuneConfig) -> Path:
    """The run directory."""
    assert cfg.run.dir is not None, "the command line fills it in"
    return Path(cfg.run.dir)


def is_finished(cfg: FinetuneConfig) -> bool:
    """Whether the run of these settings is finished."""
    return (get_run_dir(cfg) / "finished.json").exists()


def _run_or_read_summary(plan: FinetunePlan, outer_run: Run, fit: FitFn) -> RunSummary | None:
    """The summary of one run, made now or before; nothing if it was asked to leave."""
    with open_run("finetune", plan, outer_run.world, outer_run.preemption, outer_run=outer_run) as inner:
        if inner is not None:
            fit(plan, inner)
            if inner.is_preempted:
                return None
    file = get_run_dir(plan.cfg) / "finished.json"
    return outer_run.world.broadcast_object(
        json.loads(file.read_text())["summary"] if outer_run.world.rank == 0 else None
    )
