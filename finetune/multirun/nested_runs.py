"""Nested runs: several runs in one process, each with its own directory inside the outer run's directory.

A nested run resumes like any run and is not repeated once finished. The outer run (trials.py, cross_validation.py)
defines the nested runs and aggregates their summaries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.task import FinetunePlan
from foveal.atomic import read_json
from foveal.data.sampling.subset import eval_split
from foveal.renames import translate_metrics
from foveal.training.run import Run
from foveal.training.run_directory import open_run

FitFn = Callable[[FinetunePlan, Run], None]
RunSummary = dict[str, float]


@dataclass(frozen=True, slots=True)
class NestedRun:
    """Settings of a nested run, and what tells it from the others, such as "seed 1, lr 0.003"."""

    cfg: FinetuneConfig
    label: str


def run_or_reuse_nested(runs: Sequence[NestedRun], outer_run: Run, fit: FitFn, noun: str) -> Iterator[RunSummary]:
    """Run every unfinished nested run and yield all summaries in order; stop early on preemption (``is_preempted``).

    A step of the outer run is a finished nested run, so that an attempt makes progress by finishing one. ``noun``: what
    progress calls a nested run.
    """
    outer_run.start_attempt(sum(is_finished(nested.cfg) for nested in runs), num_parts=len(runs), noun=noun)
    for number, nested in enumerate(runs, start=1):
        outer_run.progress.begin_part(number, nested.label)
        plan = plan_training(nested.cfg, outer_run.world.size)
        summary, is_new = _run_or_read_summary(plan, outer_run, fit)
        if summary is None:
            outer_run.mark_preempted(number - 1)
            return
        if is_new:
            prefix = f"{eval_split(nested.cfg.data).metric_prefix}_"
            metrics = [f"{name} {value:.4f}" for name, value in summary.items() if name.startswith(prefix)]
            outer_run.progress.finish_part(number, "".join(metrics[:1]))
        else:
            outer_run.progress.move_to(number)
        yield summary


def get_run_dir(cfg: FinetuneConfig) -> Path:
    """Return the run directory."""
    assert cfg.run.dir is not None, "the command line sets run.dir"
    return Path(cfg.run.dir)


def is_finished(cfg: FinetuneConfig) -> bool:
    """Return whether the run of these settings is finished."""
    return (get_run_dir(cfg) / "finished.json").exists()


def _run_or_read_summary(plan: FinetunePlan, outer_run: Run, fit: FitFn) -> tuple[RunSummary | None, bool]:
    """Return the summary of one run, and whether this attempt finished it; None if the run was preempted."""
    with open_run("finetune", plan, outer_run.world, outer_run.preemption, outer_run=outer_run) as inner:
        is_new = inner is not None
        if inner is not None:
            fit(cast(FinetunePlan, inner.plan), inner)
            if inner.is_preempted:
                return None, True
    file = get_run_dir(plan.cfg) / "finished.json"
    summary = translate_metrics(read_json(file)["summary"]) if outer_run.world.rank == 0 else None
    return outer_run.world.broadcast_object(summary), is_new
