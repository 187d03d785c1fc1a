"""A fair comparison of ways to start: arms x seeds x learning rates, each an ordinary run in ``trials/`` of the comparison.

For every arm the learning rate is the one whose mean accuracy over the seeds is best on the held-out part of train; only
then is its accuracy on ``data.val`` looked at.
"""

import statistics

from finetune.multirun.nested_runs import FitFn, RunSummary, run_nested
from finetune.plan import FinetunePlan, trial_config
from foveal.training.run import Run


def run_trials(plan: FinetunePlan, run: Run, fit: FitFn) -> None:
    """Run every trial that is not finished, then write down each arm's own best."""
    cfg = plan.cfg
    assert cfg.trials is not None
    names = [
        (arm, repeat, lr)
        for arm in cfg.trials.arms
        for lr in cfg.trials.lr_per_256
        for repeat in range(cfg.trials.repeats)
    ]
    found: dict[tuple[str, float], list[RunSummary]] = {}
    summaries = run_nested([trial_config(cfg, *name) for name in names], run, fit)
    for (arm, _, lr), summary in zip(names, summaries, strict=False):  # fewer summaries where it was asked to leave
        found.setdefault((arm, lr), []).append(summary)
    if not run.is_preempted:
        run.mark_finished(_summarize_trials(found))


def _summarize_trials(summaries: dict[tuple[str, float], list[dict[str, float]]]) -> dict[str, float]:
    """For each arm: its best rate on the held-out part, and mean, lowest and highest top-1 on data.val over the seeds."""
    results: dict[str, float] = {}
    for arm in dict.fromkeys(arm for arm, _ in summaries):
        rates = {lr: seeds for (name, lr), seeds in summaries.items() if name == arm}
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
