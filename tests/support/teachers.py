"""Untrained teachers, and the settings of each distillation method, on the digits."""

from pathlib import Path
from typing import Any

import torch

from distill.config import DistillConfig
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.config import Pooling, VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

MEAN, STD = (0.3,), (0.4,)
DIGITS = tuple(str(digit) for digit in range(10))
TEACHER = VitConfig(name="vit_tiny_patch16_224", patch=4, width=32, depth=4, heads=2)
STUDENT = "{name: vit_tiny_patch16_224, patch: 4, width: 16, depth: 3, heads: 4}"
DISTILLED = "deit_tiny_distilled_patch16_224"
DECODER = "decoder={width: 16, depth: 1, heads: 2}"
# By method: the settings beside the teacher; logits and token need a teacher with classes.
LESSONS = {
    "features": ("distance=l1",),
    "layers": ("method=layers", "layers=[[3, 2], [1, 1]]", "distance=smooth_l1", DECODER),
    "relations": ("method=relations", "layers=[[3, 2], [4, 3]]"),
    "logits": ("method=logits", "label_weight=0.3"),
    "token": ("method=token", "model=null", f"backbone={DISTILLED}"),
    "register": ("method=token", "model.registers=1"),
}


def encoder_export(
    folder: Path,
    cfg: VitConfig = TEACHER,
    *,
    pooling: Pooling = "token",
    classes: tuple[str, ...] = (),
    image_size: int = 16,
) -> Path:
    """Write the export of an encoder, with a head if it has classes; large head weights give distinct logits."""
    torch.manual_seed(0)
    encoder = build_encoder(cfg, image_size=image_size, channels=1, pooling=pooling, num_classes=len(classes))
    if classes:
        torch.nn.init.normal_(encoder.get_parameter("head.weight"))
    card = encoder_card(cfg, image_size, 1, pooling=pooling, num_classes=len(classes))
    write_export(folder, encoder.state_dict(), Card("finetune" if classes else "pretrain", card, MEAN, STD, classes))
    return folder


def backbone_export(folder: Path, name: str, *, classes: tuple[str, ...] = (), image_size: int = 32) -> Path:
    """Write the export of a timm backbone."""
    torch.manual_seed(0)
    model = build_backbone(name, image_size=image_size, channels=1, num_classes=len(classes))
    card = backbone_card(name, image_size, 1, len(classes))
    write_export(folder, model.state_dict(), Card("finetune", card, MEAN, STD, classes))
    return folder


def config(digits: Path, teacher: Path, **settings: Any) -> DistillConfig:
    """Settings of a distillation on the digits; ``data`` and ``optim`` are merged into the defaults."""
    tree: dict[str, Any] = {
        "epochs": 1,
        "teacher": str(teacher),
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8} | settings.pop("data", {}),
        "batch": {"global_size": 64, "max_micro_size": 32},
        "optim": {} | settings.pop("optim", {}),
        "run": {"dir": "runs/x"},
    }
    return DistillConfig.from_dict(tree | settings, "here")
