"""Entry point of fine-tuning: ``accelerate launch finetune/run.py [CONFIG] [key=value ...]``, also torchrun and srun.

Without CONFIG the demo runs: it packs the digits data set if it is missing, starts from the demo's pretrained encoder
if that exists, else from scratch, and logs which.
"""

import logging
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig
from foveal.distributed.launcher import read_launch_env
from foveal.training.cli import main
from foveal.training.config_files import SHIPPED_CONFIGS
from foveal.training.stage import Stage, StageFunctions

_log = logging.getLogger("foveal.finetune")


def prepare_demo_args() -> list[str]:
    """Pack the digits data set if missing and return the demo's command line, with the demo's encoder if it exists."""
    digits, encoder = Path("data/digits"), Path("runs/demo/pretrain/export")
    if read_launch_env().rank == 0 and not (digits / "manifest.json").exists():  # packing imports torch
        from foveal.data.pack import pack_digits

        pack_digits(digits)
    pretrained = (encoder / "card.json").exists()
    _log.info(
        "no CONFIG: fine-tuning the digits %s",
        f"from {encoder}" if pretrained else f"from scratch ({encoder} is not there)",
    )
    overrides = [f"init={encoder}", "model=null"] if pretrained else []
    return [str(SHIPPED_CONFIGS / "finetune" / "digits.yaml"), *overrides]


def _import_functions() -> StageFunctions[FinetuneConfig, Any]:
    from finetune.train import FUNCTIONS

    return FUNCTIONS


STAGE = Stage(
    "finetune",
    FinetuneConfig,
    _import_functions,
    prepare_demo_args,
    examples=(
        "foveal train finetune cifar10_small init=runs/cifar10_small/export model=null",
        "accelerate launch -m foveal.cli train finetune digits",
    ),
)

if __name__ == "__main__":
    main(STAGE)
