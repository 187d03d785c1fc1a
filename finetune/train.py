"""Fine-tuning: build and run what a plan describes, one training or several."""

from typing import Any

import torch

from finetune.config import FinetuneConfig
from finetune.evaluation_details import warn_of_failure
from finetune.fit import fit
from finetune.multirun import cross_validation
from finetune.multirun.nested_runs import get_run_dir
from finetune.multirun.trials import run_trials
from finetune.plan import plan_training, trial_config
from finetune.probe.plan import ProbePlan, plan_probe_or_training
from finetune.probe.run import build_forecast_setup as build_probe
from finetune.probe.run import run_probes
from finetune.result_charts import save_fold_chart, save_trial_chart
from finetune.task import FinetunePlan
from foveal.atomic import read_json
from foveal.renames import translate_metrics
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run
from foveal.training.stage import StageFunctions


def train(plan: FinetunePlan, run: Run) -> None:
    """Run what the plan describes: one training, a cross-validation, trials, or probes."""
    if isinstance(plan, ProbePlan):
        run_probes(plan, run)
    elif plan.cfg.cross_validation is not None:
        cross_validation.cross_validate(plan, run, fit)
        _draw_folds(plan, run)
    elif plan.cfg.trials is not None:
        run_trials(plan, run, fit)
        _draw_trials(plan, run)
    else:
        fit(plan, run)


def _draw_folds(plan: FinetunePlan, run: Run) -> None:
    """Draw the first metric of every fold of a finished cross-validation."""
    if not run.is_finished or run.world.rank != 0:
        return
    with warn_of_failure("the picture 'folds'"):
        metric = f"fold_{plan.task.metrics(plan.cfg)[0].name}"
        values: dict[int, list[float]] = {}
        for cfg in cross_validation.fold_configs(plan.cfg):
            values.setdefault(cfg.seed, []).append(_read_summary(cfg)[metric])
        save_fold_chart(run, values, metric)


def _draw_trials(plan: FinetunePlan, run: Run) -> None:
    """Draw the top-1 of every finished trial on the images by which a learning rate is chosen."""
    trials = plan.cfg.trials
    if trials is None or not run.is_finished or run.world.rank != 0:
        return
    with warn_of_failure("the picture 'trials'"):
        metric = "holdout_top1" if len(trials.lr_per_256) > 1 else "val_top1"
        values = {
            (arm, lr): [
                _read_summary(trial_config(plan.cfg, arm, repeat, lr))[metric] for repeat in range(trials.repeats)
            ]
            for arm in trials.arms
            for lr in trials.lr_per_256
        }
        save_trial_chart(run, values, metric)


def _read_summary(cfg: FinetuneConfig) -> dict[str, float]:
    return translate_metrics(read_json(get_run_dir(cfg) / "finished.json")["summary"])


def plan_finetuning(cfg: FinetuneConfig, world_size: int) -> FinetunePlan:
    """Return the plan of these settings. Raises: ConfigError, DataError, ExportError, LaunchError."""
    if cfg.probe is not None:
        return plan_probe_or_training(cfg, world_size)
    return (
        cross_validation.plan_cross_validation(cfg, world_size)
        if cfg.cross_validation is not None
        else plan_training(cfg, world_size)
    )


def build(plan: FinetunePlan, device: torch.device) -> TrainingSetup[Any]:
    """Return model, parameter groups and objective of the plan; for trials, of the first trial."""
    if isinstance(plan, ProbePlan):
        return build_probe(plan, device)
    return plan.task.build(plan, device)


FUNCTIONS = StageFunctions(plan_finetuning, train, build, cross_validation.dispatch_folds)
