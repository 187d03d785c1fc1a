"""Entry point of fine-tuning: ``accelerate launch finetune/run.py [CONFIG] [key=value ...]``, also torchrun and srun.

Without CONFIG the demo runs: it packs the digits data set if it is missing, starts from the demo's pretrained encoder
if that exists, else from scratch, and logs which.
"""

import logging
from pathlib import Path
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
from foveal.data.pack import pack_digits
from foveal.distributed.launcher import read_launch_env
from foveal.training.cli import Stage, main
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_log = logging.getLogger("foveal.finetune")


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


def prepare_demo_args() -> list[str]:
    """Pack the digits data set if missing and return the demo's command line, with the demo's encoder if it exists."""
    root = Path(__file__).resolve().parents[1]
    digits, encoder = Path("data/digits"), Path("runs/demo/pretrain/export")
    if read_launch_env().rank == 0:
        pack_digits(digits)
    pretrained = (encoder / "card.json").exists()
    _log.info(
        "no CONFIG: fine-tuning the digits %s",
        f"from {encoder}" if pretrained else f"from scratch ({encoder} is not there)",
    )
    overrides = [f"init={encoder}", "model=null"] if pretrained else []
    return [str(root / "configs" / "finetune" / "digits.yaml"), *overrides]


STAGE = Stage(
    "finetune", FinetuneConfig, plan_finetuning, train, build, prepare_demo_args, cross_validation.dispatch_folds
)

if __name__ == "__main__":
    main(STAGE)
