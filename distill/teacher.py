"""A frozen teacher. It is no module, so that nothing that trains a model can reach into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.target import IN_BLOCKS, Lesson, LessonKind
from foveal.engines.base import Precision, autocast
from foveal.models.backbone import whole_alone, whole_and_places
from foveal.models.encode import encode_layers, features, without_registers
from foveal.weights.export import Card
from foveal.weights.teacher import frozen, teacher_model


class Teacher:
    """A model with weights, on a device, in evaluation mode for ever, and what it is asked.

    What it says is a function of the images and of nothing else: tensors whose rows are the images.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        card: Card,
        lesson: Lesson,
        device: torch.device,
        precision: Precision,
        image_size: int | tuple[int, int] | None = None,
        where: Path = Path("the teacher"),
    ) -> None:
        """``image_size`` is that of the images that it will see; none: of those that it was trained on.

        ``where`` names the weights' folder in the sentence of a mistake. Errors: ExportError.
        """
        self.lesson = lesson
        looks = whole_and_places if lesson.patches else whole_alone
        self.look = looks if "timm" in card.encoder else features
        self.model: Any = teacher_model(weights, card, image_size, where)
        if lesson.kind in IN_BLOCKS:
            self.model.blocks = self.model.blocks[: max(lesson.blocks)]  # what lies deeper is not asked
        frozen(self.model.to(device))
        self._precision: Precision = precision

    @torch.no_grad()
    def __call__(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """The lesson of normalised images [B, C, H, W], or of their kept patches [B, K]; fp32 tensors [B, ...].

        features: class token [B, T] and patches [B, L, T]. layers: tokens [B, 1 + K, T] of each block. relations: queries,
        keys and values [B, 1 + L, 3 T] of each block. logits: [B, classes]. token: the likeliest class, int64 [B].
        """
        with autocast(images.device, self._precision):
            told = _LESSONS[self.lesson.kind](self, images, kept)
        return tuple(each.float() if each.is_floating_point() else each for each in told)


def _features(teacher: Teacher, images: Tensor, _kept: Tensor | None) -> tuple[Tensor, ...]:
    told = teacher.look(teacher.model, images)
    return told if teacher.lesson.patches else told[:1]


def _layers(teacher: Teacher, images: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
    model = teacher.model
    return tuple(
        without_registers(model, tokens) for tokens in encode_layers(model, images, teacher.lesson.blocks, kept)
    )


def _relations(teacher: Teacher, images: Tensor, _kept: Tensor | None) -> tuple[Tensor, ...]:
    """Of a block: what its layer makes of the tokens that enter it, before norms of queries and keys and before they are
    turned by their places; the attention itself is not run.
    """
    model, depths = teacher.model, [number - 1 for number in teacher.lesson.blocks]
    entering = zip(depths, encode_layers(model, images, depths), strict=True)
    blocks = [(model.blocks[depth], without_registers(model, tokens)) for depth, tokens in entering]
    return tuple(block.attn.qkv(block.norm1(tokens)) for block, tokens in blocks)


def _logits(teacher: Teacher, images: Tensor, _kept: Tensor | None) -> tuple[Tensor, ...]:
    return (teacher.model(images),)


def _guess(teacher: Teacher, images: Tensor, _kept: Tensor | None) -> tuple[Tensor, ...]:
    return (teacher.model(images).argmax(dim=1),)


_LESSONS: dict[LessonKind, Callable[[Teacher, Tensor, Tensor | None], tuple[Tensor, ...]]] = {
    "features": _features,
    "layers": _layers,
    "relations": _relations,
    "logits": _logits,
    "token": _guess,
}
