"""A fair comparison of ways to start, inside one process: arms x seeds x learning rates, each an ordinary run.

A trial lives in ``trials/`` of the comparison's run directory and has all that a run has: it resumes, and it is not
repeated once finished. For every arm the learning rate is the one whose mean accuracy over the seeds is best on the
held-out part of train; only then is its accuracy on ``data.val`` looked at.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from finetune.planning import FinetunePlan, trial
from finetune.planning import plan as plan_of
from foveal.opening import opened
from foveal.runtime import Run

Fit = Callable[[FinetunePlan, Run], None]


def compare(plan: FinetunePlan, run: Run, fit: Fit) -> None:
    """Run every trial that is not finished, then write down each arm's own best."""
    cfg = plan.cfg
    assert cfg.trials is not None
    names = [
        (arm, repeat, lr)
        for arm in cfg.trials.arms
        for lr in cfg.trials.lr_per_256
        for repeat in range(cfg.trials.repeats)
    ]
    run.begin(_finished(run.path), total=len(names))
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
    for done, (arm, repeat, lr) in enumerate(names, start=1):
        one = plan_of(trial(cfg, arm, repeat, lr), run.world.size)
        summary = _one(one, run, fit)
        if summary is None:
            return run.leave(done - 1)
        found.setdefault((arm, lr), []).append(summary)
        run.progress.tell(done, f"{arm}, seed {cfg.seed + repeat}, lr {lr:g}: top-1 {summary['val_top1']:.3f}")
    run.finish(_chosen(found))
    return None


def _finished(run: Path) -> int:
    """Trials that are done: an attempt that adds one has got further."""
    return len(list(run.glob("trials/*/finished.json")))


def _one(plan: FinetunePlan, run: Run, fit: Fit) -> dict[str, float] | None:
    """The summary of one trial, run now or before; nothing if it was asked to leave."""
    with opened("finetune", plan, run.world, run.preemption, within=run) as inner:
        if inner is not None:
            fit(plan, inner)
            if inner.left:
                return None
    assert plan.cfg.run.dir is not None
    file = Path(plan.cfg.run.dir) / "finished.json"
    return run.world.broadcast(json.loads(file.read_text())["summary"] if run.world.rank == 0 else None)


def _chosen(found: dict[tuple[str, float], list[dict[str, float]]]) -> dict[str, float]:
    """For each arm: its best rate on the held-out part, and mean, lowest and highest top-1 on data.val over the seeds."""
    results: dict[str, float] = {}
    for arm in dict.fromkeys(arm for arm, _ in found):
        rates = {lr: seeds for (name, lr), seeds in found.items() if name == arm}
        held_out = (
            {lr: statistics.fmean(seed["holdout_top1"] for seed in rates[lr]) for lr in rates} if len(rates) > 1 else {}
        )
        best = max(held_out, key=lambda lr: held_out[lr]) if held_out else next(iter(rates))
        top1 = [seed["val_top1"] for seed in rates[best]]
        results |= {
            f"{arm}_lr_per_256": best,
            f"{arm}_top1": statistics.fmean(top1),
            f"{arm}_top1_lowest": min(top1),
            f"{arm}_top1_highest": max(top1),
        }
        results |= {f"{arm}_holdout_top1": held_out[best]} if held_out else {}
    return results
