"""Pretraining: ``python -m pretrain.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from typing import Any

from foveal.training.cli import main
from foveal.training.stage import Stage, StageFunctions
from pretrain.config import PretrainConfig


def _import_functions() -> StageFunctions[PretrainConfig, Any]:
    from pretrain.train import FUNCTIONS

    return FUNCTIONS


STAGE = Stage(
    "pretrain",
    PretrainConfig,
    _import_functions,
    examples=(
        "foveal train pretrain cifar10_small epochs=3 run.dir=runs/first",
        "torchrun --nproc-per-node=2 -m foveal.cli train pretrain digits",
    ),
)

if __name__ == "__main__":
    main(STAGE)
