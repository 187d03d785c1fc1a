"""Comparison of initializations: arms x seeds x learning rates, each a nested run in ``trials/`` of the run directory.

Each arm's learning rate is the one with the best mean accuracy over seeds on the holdout part of data.train; accuracy
on ``data.val`` is reported for that learning rate only.
"""

import statistics

from finetune.list_edges import describe_list_edge
from finetune.multirun.nested_runs import FitFn, NestedRun, RunSummary, run_or_reuse_nested
from finetune.plan import trial_config
from finetune.task import FinetunePlan
from foveal.training.run import Run


def run_trials(plan: FinetunePlan, run: Run, fit: FitFn) -> None:
    """Run every unfinished trial, then record each arm's results at its best learning rate."""
    cfg = plan.cfg
    assert cfg.trials is not None
    trials = [
        (arm, repeat, lr)
        for arm in cfg.trials.arms
        for lr in cfg.trials.lr_per_256
        for repeat in range(cfg.trials.repeats)
    ]
    results: dict[tuple[str, float], list[RunSummary]] = {}
    runs = [
        NestedRun(trial_config(cfg, arm, repeat, lr), f"{arm}, lr {lr:g}, seed {cfg.seed + repeat}")
        for arm, repeat, lr in trials
    ]
    summaries = run_or_reuse_nested(runs, run, fit, "trial")
    for (arm, _, lr), summary in zip(trials, summaries, strict=False):  # preemption ends the summaries early
        results.setdefault((arm, lr), []).append(summary)
    if not run.is_preempted:
        summary = _summarize_trials(results)
        rates = cfg.trials.lr_per_256
        run.notes = [
            note
            for arm in cfg.trials.arms
            if (note := describe_list_edge(arm, "lr_per_256", summary[f"{arm}_lr_per_256"], rates))
        ]
        run.mark_finished(summary)


def _summarize_trials(summaries: dict[tuple[str, float], list[dict[str, float]]]) -> dict[str, float]:
    """Return for each arm its best learning rate on the holdout, and mean, lowest and highest top-1 on data.val."""
    results: dict[str, float] = {}
    for arm in dict.fromkeys(arm for arm, _ in summaries):
        by_lr = {lr: seeds for (name, lr), seeds in summaries.items() if name == arm}
        holdout_top1 = (
            {lr: statistics.fmean(seed["holdout_top1"] for seed in by_lr[lr]) for lr in by_lr} if len(by_lr) > 1 else {}
        )
        best = max(holdout_top1, key=lambda lr: holdout_top1[lr]) if holdout_top1 else next(iter(by_lr))
        top1 = [seed["val_top1"] for seed in by_lr[best]]
        results |= {
            f"{arm}_lr_per_256": best,
            f"{arm}_top1": statistics.fmean(top1),
            f"{arm}_top1_lowest": min(top1),
            f"{arm}_top1_highest": max(top1),
        }
        if holdout_top1:
            results[f"{arm}_holdout_top1"] = holdout_top1[best]
    return results
