"""Fine-tuning: build and run what a plan describes, one training or several."""

from typing import Any

import torch

from finetune.config import FinetuneConfig
from finetune.fit import fit
from finetune.multirun import cross_validation
from finetune.multirun.trials import run_trials
from finetune.plan import plan_training
from finetune.probe.plan import ProbePlan, plan_probe_or_training
from finetune.probe.run import build_forecast_setup as build_probe
from finetune.probe.run import run_probes
from finetune.task import FinetunePlan
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run
from foveal.training.stage import StageFunctions


def train(plan: FinetunePlan, run: Run) -> None:
    """Run what the plan describes: one training, a cross-validation, trials, or probes."""
    if isinstance(plan, ProbePlan):
        run_probes(plan, run)
    elif plan.cfg.cross_validation is not None:
        cross_validation.cross_validate(plan, run, fit)
    elif plan.cfg.trials is not None:
        run_trials(plan, run, fit)
    else:
        fit(plan, run)


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
