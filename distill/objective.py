"""Imitation of a teacher, by one student or several. B images, L patches, K kept, M masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import DistillConfig
from distill.losses import DISTANCES, label_loss, relation_losses
from distill.target import LessonKind
from distill.teacher import Teacher
from distill.teacher_cache import Lessons
from foveal.data import Batch, normalise
from foveal.engines.base import autocast
from foveal.models.patches import patch_losses, split_by_noise, targets
from foveal.seeding import key, uniforms
from foveal.weights.teacher import soft_loss

Answer = tuple[Tensor, ...]
Told = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Seen:
    """What teacher and students saw: normalised images [B, C, H, W], the masked patches [B, M], the labels [B]."""

    images: Tensor
    masked: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class Imitate:
    """The sum of the students' distances from the teacher. Which patches are masked depends on (seed, epoch, sample id).

    ``names`` are the students', by which their numbers are called; an empty one is that of the only student.
    """

    teacher: Teacher
    cfg: DistillConfig
    names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    lessons: Lessons | None = None

    def weight(self, batch: Batch) -> float:
        """Every image counts once, with a label or without."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> Told:
        images = normalise(batch.images, self.mean, self.std)
        kept, masked = self.masks(batch)
        lesson = self.lesson(batch, images, kept)
        seen = Seen(images, masked, batch.labels)
        losses, numbers = [], {}
        answers = model(images, kept, masked)
        # Engines differ in whether their autocast reaches to here, and what is compared is close together.
        with autocast(images.device, "fp32"):
            for name, answer in zip(self.names, answers, strict=True):
                loss_B, more = _LOSSES[self.cfg.lesson](self, answer, lesson, seen)
                more |= {"loss": loss_B} if name else {}
                numbers |= {f"{name}/{each}" if name else each: value.sum() for each, value in more.items()}
                losses.append(loss_B.sum())
        return sum(losses[1:], losses[0]), numbers

    def lesson(self, batch: Batch, images: Tensor, kept: Tensor | None) -> Answer:
        """What the teacher says, or has said before of the same views of the same images."""
        if self.lessons is None:
            return self.teacher(images, kept)
        rows = batch.ids if self.cfg.still else batch.draws
        found = self.lessons.asked(rows, lambda: self.teacher(images, kept))
        return tuple(each.to(images.device, non_blocking=True) for each in found)

    def masks(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The places of the kept patches [B, K] and of the masked ones [B, M]; none, where whole images are seen."""
        if self.cfg.lesson != "layers":
            return None, None
        height, width = (side // self.teacher.lesson.patch for side in batch.images.shape[2:])
        noise = uniforms(key(self.cfg.seed, "mask"), batch.draws, height * width)
        return split_by_noise(noise, self.cfg.mask_ratio)


def _features(of: Imitate, answer: Answer, lesson: Answer, _seen: Seen) -> Told:
    """Class token, and patches unless they weigh nothing."""
    apart = DISTANCES[of.cfg.distance]
    cls_B = apart(answer[0].float(), lesson[0])
    if not of.cfg.patch_weight:
        return of.cfg.cls_weight * cls_B, {"cls_distance": cls_B}
    patches_B = apart(answer[1].float(), lesson[1]).mean(dim=1)
    loss_B = of.cfg.cls_weight * cls_B + of.cfg.patch_weight * patches_B
    return loss_B, {"cls_distance": cls_B, "patch_distance": patches_B}


def _layers(of: Imitate, answer: Answer, lesson: Answer, seen: Seen) -> Told:
    """The mean over pairs of the tokens' mean distance, and the mean error of the masked patches (Bai et al., 2023)."""
    apart = DISTANCES[of.cfg.distance]
    pairs = zip(answer[: len(lesson)], lesson, strict=True)
    token_B = _mean([apart(his.float(), hers).mean(dim=1) for his, hers in pairs])
    if not of.cfg.pixel_weight:
        return token_B, {"token_distance": token_B}
    assert seen.masked is not None
    wanted = targets(seen.images, seen.masked, of.teacher.lesson.patch, of.cfg.norm_pix)
    pixel_B = patch_losses(answer[-1], wanted).mean(dim=1)
    return token_B + of.cfg.pixel_weight * pixel_B, {"token_distance": token_B, "pixel_loss": pixel_B}


def _relations(of: Imitate, answer: Answer, lesson: Answer, _seen: Seen) -> Told:
    """The mean over pairs of both relations' divergences (Ren et al., 2023)."""
    found = [
        relation_losses(his.float(), hers, of.teacher.lesson.heads) for his, hers in zip(answer, lesson, strict=True)
    ]
    qk_B, vv_B = (_mean(each) for each in zip(*found, strict=True))
    return qk_B + vv_B, {"qk_divergence": qk_B, "vv_divergence": vv_B}


def _logits(of: Imitate, answer: Answer, lesson: Answer, seen: Seen) -> Told:
    """(1 - label_weight) of the teacher's soft labels and label_weight of the labels (Hinton et al., 2015).

    The denominator is all images: one without a label counts with its soft part alone.
    """
    logits, weight = answer[0].float(), of.cfg.label_weight
    soft_B = soft_loss(logits, lesson[0], of.cfg.temperature)
    numbers = {"soft_loss": soft_B, "agreement": logits.argmax(dim=1) == lesson[0].argmax(dim=1)}
    if not weight:
        return soft_B, numbers
    label_B = label_loss(logits, seen.labels)
    return (1 - weight) * soft_B + weight * label_B, numbers | {"label_loss": label_B}


def _token(of: Imitate, answer: Answer, lesson: Answer, seen: Seen) -> Told:
    """The class token learns the labels, the distillation token the teacher's guess (Touvron et al., 2021, equation 3).

    The denominator is all images: one without a label counts with the teacher's guess alone.
    """
    (logits, distilled), weight = (each.float() for each in answer), of.cfg.label_weight
    label_B, guess_B = label_loss(logits, seen.labels), label_loss(distilled, lesson[0])
    numbers = {"label_loss": label_B, "guess_loss": guess_B, "agreement": distilled.argmax(dim=1) == lesson[0]}
    return weight * label_B + (1 - weight) * guess_B, numbers


def _mean(pairs: Sequence[Tensor]) -> Tensor:
    return torch.stack([*pairs]).mean(dim=0)


_LOSSES: dict[LessonKind, Callable[[Imitate, Answer, Answer, Seen], Told]] = {
    "features": _features,
    "layers": _layers,
    "relations": _relations,
    "logits": _logits,
    "token": _token,
}
