"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from typing import Any

from distill.config import DistillConfig
from foveal.training.cli import main
from foveal.training.stage import Stage, StageFunctions


def _import_functions() -> StageFunctions[DistillConfig, Any]:
    from distill.train import FUNCTIONS

    return FUNCTIONS


STAGE = Stage(
    "distill",
    DistillConfig,
    _import_functions,
    examples=(
        "foveal train distill digits teacher=runs/digits/export",
        "torchrun --nproc-per-node=2 -m foveal.cli train distill cifar10_small teacher=runs/cifar10_small/export",
    ),
)

if __name__ == "__main__":
    main(STAGE)
