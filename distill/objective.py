"""Imitation of a teacher's final features. B images, L patches, T teacher width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from distill.teacher import Teacher
from foveal.data import Batch, normalise


def cosine(answer: Tensor, lesson: Tensor) -> Tensor:
    """1 - cosine similarity of two [..., T], as [...]."""
    return 1.0 - F.cosine_similarity(answer, lesson, dim=-1)


def smooth_l1(answer: Tensor, lesson: Tensor) -> Tensor:
    """The Huber loss with threshold 1 of two [..., T], mean over T, as [...]."""
    return F.smooth_l1_loss(answer, lesson, reduction="none").mean(dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "smooth_l1": smooth_l1}


@dataclass(frozen=True)
class Imitate:
    """The distance between the student's tokens, mapped to the teacher's width, and the teacher's."""

    teacher: Teacher
    distance: Literal["cosine", "smooth_l1"]
    cls_weight: float
    patch_weight: float
    mean: Sequence[float]
    std: Sequence[float]

    def weight(self, batch: Batch) -> float:
        """Every image counts once."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = normalise(batch.images, self.mean, self.std)
        cls_lesson, patches_lesson = self.teacher(images)
        cls_answer, patches_answer = model(images)
        apart = DISTANCES[self.distance]
        cls_B = apart(cls_answer.float(), cls_lesson)
        patches_B = apart(patches_answer.float(), patches_lesson).mean(dim=1)
        total = (self.cls_weight * cls_B + self.patch_weight * patches_B).sum()
        return total, {"cls_distance": cls_B.sum(), "patch_distance": patches_B.sum()}
