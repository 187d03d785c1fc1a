"""Distillation loss of a teacher beside the labels. B images, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig, TeacherConfig
from foveal.engines.attention import apply_attention
from foveal.engines.base import autocast
from foveal.engines.config import Precision
from foveal.weights.pretrained import PretrainedSource
from foveal.weights.teacher import build_unfrozen_teacher, distillation_loss_per_image, freeze_in_eval_mode


@dataclass(frozen=True)
class TeacherLoss:
    """Loss between student and a frozen teacher on the same images.

    It is not an nn.Module, so that no engine wraps, shards or saves the teacher.
    """

    cfg: TeacherConfig
    model: nn.Module
    precision: Precision

    def __call__(self, images: Tensor, logits_BK: Tensor) -> Tensor:
        """Return the loss [B] of the student's logits; with ``kind=token`` those of the student's distillation token.

        soft: divergence from the teacher's logits at a temperature. hard, token: cross-entropy with the teacher's
        predicted class.
        """
        with torch.no_grad(), autocast(images.device, self.precision):
            teacher_logits_BK = self.model(images).float()
        with autocast(images.device, "fp32"):
            if self.cfg.kind == "soft":
                return distillation_loss_per_image(logits_BK, teacher_logits_BK, self.cfg.temperature)
            return F.cross_entropy(logits_BK, teacher_logits_BK.argmax(dim=1), reduction="none")


def build_teacher_loss(
    cfg: FinetuneConfig, source: PretrainedSource | None, device: torch.device
) -> TeacherLoss | None:
    """Return the loss with the plan's teacher on the device, or None without a teacher. Raises: ExportError."""
    if cfg.teacher is None:
        return None
    assert source is not None
    model = build_unfrozen_teacher(source.load_weights(), source.card, cfg.data.image_size, source.path)
    apply_attention(model, cfg.engine)
    return TeacherLoss(cfg.teacher, freeze_in_eval_mode(model.to(device)), cfg.engine.precision)
