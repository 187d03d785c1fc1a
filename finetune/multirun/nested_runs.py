"""Runs inside a run, in one process: each has a place in the outer run's directory and all that a run has.

It resumes, and it is not repeated once finished. What the outer run is about (trials.py, folds.py) decides which runs
there are and what their numbers come to.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune.config import FinetuneConfig
from finetune.plan import FinetunePlan
from finetune.plan import plan as plan_of
from foveal.data.sampling.subset import judge
from foveal.training.run import Run
from foveal.training.run_directory import opened

Fit = Callable[[FinetunePlan, Run], None]
Summary = dict[str, float]


def each_of(configs: Sequence[FinetuneConfig], run: Run, fit: Fit) -> Iterator[Summary]:
    """Run what is not finished, and give the summary of each in turn; fewer where the run was asked to leave (``left``).

    The outer run's steps are the runs that are finished: an attempt that adds one has got further.
    """
    run.begin(sum(is_finished(cfg) for cfg in configs), total=len(configs))
    for done, cfg in enumerate(configs, start=1):
        summary = _one(plan_of(cfg, run.world.size), run, fit)
        if summary is None:
            run.leave(done - 1)
            return
        on = f"{judge(cfg.data).name}_"
        told = next((f", {name} {value:.3f}" for name, value in summary.items() if name.startswith(on)), "")
        run.progress.tell(done, f"{folder_of(cfg).name}{told}")
        yield summary


def folder_of(cfg: FinetuneConfig) -> Path:
    """The run directory."""
    assert cfg.run.dir is not None, "the command line fills it in"
    return Path(cfg.run.dir)


def is_finished(cfg: FinetuneConfig) -> bool:
    """Whether the run of these settings is finished."""
    return (folder_of(cfg) / "finished.json").exists()


def _one(plan: FinetunePlan, run: Run, fit: Fit) -> Summary | None:
    """The summary of one run, made now or before; nothing if it was asked to leave."""
    with opened("finetune", plan, run.world, run.preemption, within=run) as inner:
        if inner is not None:
            fit(plan, inner)
            if inner.left:
                return None
    file = folder_of(plan.cfg) / "finished.json"
    return run.world.broadcast(json.loads(file.read_text())["summary"] if run.world.rank == 0 else None)
