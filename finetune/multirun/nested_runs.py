"""Nested runs: several runs in one process, each with its own directory inside the outer run's directory.

A nested run resumes like any run and is not repeated once finished. The outer run (trials.py, cross_validation.py)
defines the nested runs and aggregates their summaries.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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


def run_or_reuse_nested(configs: Sequence[FinetuneConfig], outer_run: Run, fit: FitFn) -> Iterator[RunSummary]:
    """Run every unfinished nested run and yield all summaries in order; stop early on preemption (``is_preempted``).

    A step of the outer run is a finished nested run, so that an attempt makes progress by finishing one.
    """
    outer_run.start_attempt(sum(is_finished(cfg) for cfg in configs), total_steps=len(configs))
    for number, cfg in enumerate(configs, start=1):
        summary = _run_or_read_summary(plan_training(cfg, outer_run.world.size), outer_run, fit)
        if summary is None:
            outer_run.mark_preempted(number - 1)
            return
        prefix = f"{eval_split(cfg.data).metric_prefix}_"
        metric = next((f", {name} {value:.3f}" for name, value in summary.items() if name.startswith(prefix)), "")
        outer_run.progress.update(number, f"{get_run_dir(cfg).name}{metric}")
        yield summary


def get_run_dir(cfg: FinetuneConfig) -> Path:
    """Return the run directory."""
    assert cfg.run.dir is not None, "the command line sets run.dir"
    return Path(cfg.run.dir)


def is_finished(cfg: FinetuneConfig) -> bool:
    """Return whether the run of these settings is finished."""
    return (get_run_dir(cfg) / "finished.json").exists()


def _run_or_read_summary(plan: FinetunePlan, outer_run: Run, fit: FitFn) -> RunSummary | None:
    """Return the summary of one run, from this or an earlier attempt; None if the run was preempted."""
    with open_run("finetune", plan, outer_run.world, outer_run.preemption, outer_run=outer_run) as inner:
        if inner is not None:
            fit(plan, inner)
            if inner.is_preempted:
                return None
    file = get_run_dir(plan.cfg) / "finished.json"
    return outer_run.world.broadcast_object(
        translate_metrics(read_json(file)["summary"]) if outer_run.world.rank == 0 else None
    )
