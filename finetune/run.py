"""Fine-tuning: ``accelerate launch finetune/run.py [CONFIG] [key=value ...]``, also under torchrun and srun.

Without CONFIG it is the demo's: it packs the digits if they are missing, and starts from the demo's pretrained encoder
if there is one, else from scratch, and says which.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from finetune.config import FinetuneConfig
from finetune.fit import fit
from finetune.multirun import cross_validation
from finetune.multirun.trials import run_trials
from finetune.plan import FinetunePlan
from finetune.plan import plan_training as plan_of_one
from finetune.probe.plan import ProbePlan
from finetune.probe.plan import plan_probe as plan_of_probe
from finetune.probe.run import build as probe_parts
from finetune.probe.run import run_probes
from finetune.tasks.registry import TASKS
from foveal.data.pack import pack_digits
from foveal.distributed.launcher import read_launch_env
from foveal.training.cli import Stage, main
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_log = logging.getLogger("foveal.finetune")


def train(plan: FinetunePlan, run: Run) -> None:
    """One run, or one that is made of many, or probes of an encoder that stays as it is."""
    if isinstance(plan, ProbePlan):
        run_probes(plan, run)
    elif plan.cfg.folds is not None:
        cross_validation.cross_validate(plan, run, fit)
    elif plan.cfg.trials is not None:
        run_trials(plan, run, fit)
    else:
        fit(plan, run)


def plan_finetuning(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    """What is done with these settings, or why not. Raises: ConfigError, DataError, ExportError, LaunchError."""
    if cfg.probe is not None:
        return plan_of_probe(cfg, ranks)
    return cross_validation.plan_cross_validation(cfg, ranks) if cfg.folds is not None else plan_of_one(cfg, ranks)


def build(plan: FinetunePlan, device: torch.device) -> TrainingSetup[Any]:
    """What a step of the plan is made of; of a comparison, of its first trial."""
    if isinstance(plan, ProbePlan):
        return probe_parts(plan, device)
    return TASKS[plan.cfg.data.labels].build(plan, device)


def prepare_demo_args() -> list[str]:
    """The command line of a start without CONFIG: the digits, packed if missing, from the demo's encoder if it is there."""
    root = Path(__file__).resolve().parents[1]
    digits, encoder = Path("data/digits"), Path("runs/demo/pretrain/export")
    if read_launch_env().rank == 0:
        pack_digits(digits)
    found = (encoder / "card.json").exists()
    _log.info(
        "no CONFIG: fine-tuning the digits %s", f"from {encoder}" if found else f"from scratch ({encoder} is not there)"
    )
    return [str(root / "configs" / "finetune" / "digits.yaml"), *([f"init={encoder}", "model=null"] if found else [])]


STAGE = Stage(
    "finetune", FinetuneConfig, plan_finetuning, train, build, prepare_demo_args, cross_validation.dispatch_folds
)

if __name__ == "__main__":
    main(STAGE)
