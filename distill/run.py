"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from typing import Any

from distill.config import DistillConfig
from foveal.training.cli import main
from foveal.training.stage import Stage, StageFunctions


def _import_functions() -> StageFunctions[DistillConfig, Any]:
    from distill.train import FUNCTIONS

    return FUNCTIONS


STAGE = Stage("distill", DistillConfig, _import_functions)

if __name__ == "__main__":
    main(STAGE)
