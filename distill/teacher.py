"""A frozen teacher. It is no module, so that nothing that trains a model can reach into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.target import BLOCK_METHODS, DistillMethod, TeacherTarget
from foveal.engines.base import Precision, autocast
from foveal.models.backbone import forward_pooled, forward_pooled_and_tokens
from foveal.models.encode import drop_registers, encode_cls_and_patches, encode_layers
from foveal.weights.export import Card
from foveal.weights.teacher import build_teacher, freeze_in_eval_mode


class Teacher:
    """A model with weights, on a device, in evaluation mode for ever, and what it is asked.

    What it says is a function of the images and of nothing else: tensors whose rows are the images.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        card: Card,
        target: TeacherTarget,
        device: torch.device,
        precision: Precision,
        image_size: int | tuple[int, int] | None = None,
        where: Path = Path("the teacher"),
    ) -> None:
        """``image_size`` is that of the images that it will see; none: of those that it was trained on.

        ``where`` names the weights' folder in the sentence of a mistake. Raises: ExportError.
        """
        self.target = target
        looks = forward_pooled_and_tokens if target.patches else forward_pooled
        self.extract_features = looks if "timm" in card.encoder else encode_cls_and_patches
        self.model: Any = build_teacher(weights, card, image_size, where)
        if target.kind in BLOCK_METHODS:
            self.model.blocks = self.model.blocks[: max(target.blocks)]  # what lies deeper is not asked
        freeze_in_eval_mode(self.model.to(device))
        self._precision: Precision = precision

    @torch.no_grad()
    def __call__(self, images: Tensor, visible_indices: Tensor | None = None) -> tuple[Tensor, ...]:
        """The lesson of normalised images [B, C, H, W], or of their kept patches [B, K]; fp32 tensors [B, ...].

        features: class token [B, T] and patches [B, L, T]. layers: tokens [B, 1 + K, T] of each block. relations: queries,
        keys and values [B, 1 + L, 3 T] of each block. logits: [B, classes]. token: the likeliest class, int64 [B].
        """
        with autocast(images.device, self._precision):
            told = _TARGET_FUNCTIONS[self.target.kind](self, images, visible_indices)
        return tuple(each.float() if each.is_floating_point() else each for each in told)


def _feature_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    told = teacher.extract_features(teacher.model, images)
    return told if teacher.target.patches else told[:1]


def _layer_targets(teacher: Teacher, images: Tensor, visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    model = teacher.model
    return tuple(
        drop_registers(model, tokens) for tokens in encode_layers(model, images, teacher.target.blocks, visible_indices)
    )


def _relation_targets(teacher: Teacher, images: Tensor, _visible_indices: Tensor | None) -> tuple[Tensor, ...]:
    """Of a block: what its layer makes of the tokens that enter it, before norms of queries and keys and before they are
    turned by their places; the attention itself is not run.
    """
    model, depths = teacher.model, [number - 1 for number in teacher.target.blocks]
    entering = zip(depths, encode_layers(model, images, depths), strict=True)
    blocks = [(model.blocks[depth], drop_registers(model, tokens)) for depth, tokens in entering]
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
