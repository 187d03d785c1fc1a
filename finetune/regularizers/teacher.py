"""A teacher beside the labels. B images, K classes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig, TeacherConfig
from foveal.engines.base import Precision, autocast
from foveal.errors import ExportError
from foveal.models.backbone import card_of
from foveal.weights.pretrained import Origin, origin_of
from foveal.weights.teacher import frozen, soft_loss, teacher_model


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier that sees what the student sees. It is no module, so that no engine can reach into it."""

    cfg: TeacherConfig
    model: nn.Module
    precision: Precision

    def __call__(self, images: Tensor, logits_BK: Tensor) -> Tensor:
        """How far the student's logits are from the teacher's, [B]: divergence at a temperature, or its guess as label.

        They are those of the student's distillation token where there is one, which learns the guess alone.
        """
        with torch.no_grad(), autocast(images.device, self.precision):
            told_BK = self.model(images).float()
        with autocast(images.device, "fp32"):
            if self.cfg.kind == "soft":
                return soft_loss(logits_BK, told_BK, self.cfg.temperature)
            return F.cross_entropy(logits_BK, told_BK.argmax(dim=1), reduction="none")


def teacher_of(cfg: FinetuneConfig, origin: Origin | None, device: torch.device) -> Teacher | None:
    """The teacher that was looked at, on the device. Errors: ExportError."""
    if cfg.teacher is None:
        return None
    assert origin is not None
    model = teacher_model(origin.weights(), origin.card, cfg.data.image_size, origin.place)
    return Teacher(cfg.teacher, frozen(model.to(device)), cfg.engine.precision)


def teachers_origin(
    cfg: FinetuneConfig, classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> Origin | None:
    """The settings' teacher, which must have the same classes and see the same pixels. Errors: ExportError."""
    if cfg.teacher is None:
        return None
    origin = origin_of(Path(cfg.teacher.init), None, cfg.data)
    if not origin.card.encoder.get("classes"):
        raise ExportError(
            f"the teacher {cfg.teacher.init} has no head that tells classes of an image; give the export of a classifier"
        )
    channels = card_of(origin.card.encoder, f"{cfg.teacher.init}/card.json").channels
    for name, hers, ours in (
        ("classes", origin.card.classes, classes),
        ("channels", channels, cfg.data.channels),
        ("mean", origin.card.mean, mean),
        ("std", origin.card.std, std),
    ):
        if hers != ours:
            raise ExportError(
                f"the teacher {cfg.teacher.init} has {name} {_short(hers)}, the student {_short(ours)}; they must be equal"
            )
    return origin


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
