"""The frozen teacher. It is not an nn.Module, so that no code that trains a model can change it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.target import BLOCK_METHODS, DistillMethod, TeacherTarget
from foveal.engines.base import autocast
from foveal.engines.config import Precision
from foveal.models.backbone import forward_pooled, forward_pooled_and_patches
from foveal.models.encode import drop_registers, encode_cls_and_patches, encode_layers
from foveal.weights.export import Card
from foveal.weights.teacher import build_unfrozen_teacher, freeze_in_eval_mode


class Teacher:
    """A model with weights on a device, permanently in evaluation mode, and the target it computes.

    Row b of each output depends on image b only.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        card: Card,
        target: TeacherTarget,
        device: torch.device,
        precision: Precision,
        image_size: int | tuple[int, int] | None = None,
        path: Path = Path("the teacher"),
    ) -> None:
        """Build the model. ``image_size`` is the input size, None the size it was trained on.

        ``path`` is the path in error messages. Raises: ExportError if weights and card do not match.
        """
        self.target = target
        backbone_features = forward_pooled_and_patches if target.patches else forward_pooled
        self.extract_features = backbone_features if "timm" in card.encoder else encode_cls_and_patches
        self.model: Any = build_unfrozen_teacher(weights, card, image_size, path)
        if target.kind in BLOCK_METHODS:
            self.model.blocks = self.model.blocks[: max(target.blocks)]  # deeper blocks are not needed
        freeze_in_eval_mode(self.model.to(device))
        self._precision: Precision = precision

    @torch.no_grad()
    def __call__(self, images: Tensor, visible_indices: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the target of normalised images [B, C, H, W], or of their visible patches [B, K]; fp32 [B, ...].

        features: class token [B, T] and patches [B, L, T]. layers: tokens [B, 1 + K, T] of each block. relations:
        queries, keys and values [B, 1 + L, 3 T] of each block. logits: [B, classes]. token: predicted class, int64 [B].
        """
        with autocast(images.device, self._precision):
            outputs = _TARGET_FUNCTIONS[self.target.kind](self, images, visible_indices)
        return tuple(output.float() if output.is_floating_point() else output for output in outputs)


def _feature_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    features = teacher.extract_features(teacher.model, images)
    return features if teacher.target.patches else features[:1]


def _layer_targets(teacher: Teacher, images: Tensor, visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    model = teacher.model
    return tuple(
        drop_registers(model, tokens) for tokens in encode_layers(model, images, teacher.target.blocks, visible_indices)
    )


def _relation_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    """Outputs of the blocks' qkv layers, before query-key norms and rotary embedding; the attention is not run."""
    model, depths = teacher.model, [number - 1 for number in teacher.target.blocks]
    inputs = zip(depths, encode_layers(model, images, depths), strict=True)
    blocks = [(model.blocks[depth], drop_registers(model, tokens)) for depth, tokens in inputs]
    return tuple(block.attn.qkv(block.norm1(tokens)) for block, tokens in blocks)


def _logit_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    return (teacher.model(images),)


def _class_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    return (teacher.model(images).argmax(dim=1),)


_TARGET_FUNCTIONS: dict[DistillMethod, Callable[[Teacher, Tensor, Tensor | None], tuple[Tensor, ...]]] = {
    "features": _feature_targets,
    "layers": _layer_targets,
    "relations": _relation_targets,
    "logits": _logit_targets,
    "token": _class_targets,
}
