"""A teacher beside the labels. B images, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig, TeacherConfig
from foveal.engines.base import Precision, autocast
from foveal.weights.pretrained import PretrainedSource
from foveal.weights.teacher import build_teacher, freeze_in_eval_mode, soft_target_loss


@dataclass(frozen=True)
class TeacherLoss:
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
                return soft_target_loss(logits_BK, told_BK, self.cfg.temperature)
            return F.cross_entropy(logits_BK, told_BK.argmax(dim=1), reduction="none")


def build_teacher_loss(
    cfg: FinetuneConfig, source: PretrainedSource | None, device: torch.device
) -> TeacherLoss | None:
    """The teacher that was looked at, on the device. Raises: ExportError."""
    if cfg.teacher is None:
        return None
    assert source is not None
    model = build_teacher(source.load_weights(), source.card, cfg.data.image_size, source.path)
    return TeacherLoss(cfg.teacher, freeze_in_eval_mode(model.to(device)), cfg.engine.precision)
