"""Imitation of a teacher, by one student or several. B images, L patches, K kept, M masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import DistillConfig
from distill.losses import DISTANCES, label_loss, relation_losses
from distill.target import DistillMethod
from distill.teacher import Teacher
from distill.teacher_cache import TeacherCache
from foveal.data import Batch, normalise
from foveal.engines.base import autocast
from foveal.models.patches import build_reconstruction_targets, patch_mse, split_patches_by_noise
from foveal.seeding import derive_key, draw_uniform
from foveal.weights.teacher import soft_target_loss

TensorTuple = tuple[Tensor, ...]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class LossInputs:
    """What teacher and students saw: normalised images [B, C, H, W], the masked patches [B, M], the labels [B]."""

    images: Tensor
    masked_indices: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """The sum of the students' distances from the teacher. Which patches are masked depends on (seed, epoch, sample id).

    ``names`` are the students', by which their numbers are called; an empty one is that of the only student.
    """

    teacher: Teacher
    cfg: DistillConfig
    student_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    teacher_cache: TeacherCache | None = None

    def batch_weight(self, batch: Batch) -> float:
        """Every image counts once, with a label or without."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> LossAndMetrics:
        images = normalise(batch.images, self.mean, self.std)
        kept, masked = self.sample_mask_indices(batch)
        lesson = self.get_teacher_outputs(batch, images, kept)
        seen = LossInputs(images, masked, batch.labels)
        losses, numbers = [], {}
        answers = model(images, kept, masked)
        # Engines differ in whether their autocast reaches to here, and what is compared is close together.
        with autocast(images.device, "fp32"):
            for name, answer in zip(self.student_names, answers, strict=True):
                loss_B, more = _LOSSES[self.cfg.lesson](self, answer, lesson, seen)
                more |= {"loss": loss_B} if name else {}
                numbers |= {f"{name}/{each}" if name else each: value.sum() for each, value in more.items()}
                losses.append(loss_B.sum())
        return sum(losses[1:], losses[0]), numbers

    def get_teacher_outputs(self, batch: Batch, images: Tensor, visible_indices: Tensor | None) -> TensorTuple:
        """What the teacher says, or has said before of the same views of the same images."""
        if self.teacher_cache is None:
            return self.teacher(images, visible_indices)
        rows = batch.ids if self.cfg.has_fixed_targets else batch.sample_keys
        found = self.teacher_cache.get_or_compute(rows, lambda: self.teacher(images, visible_indices))
        return tuple(each.to(images.device, non_blocking=True) for each in found)

    def sample_mask_indices(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The places of the kept patches [B, K] and of the masked ones [B, M]; none, where whole images are seen."""
        if self.cfg.lesson != "layers":
            return None, None
        height, width = (side // self.teacher.target.patch for side in batch.images.shape[2:])
        noise = draw_uniform(derive_key(self.cfg.seed, "mask"), batch.sample_keys, height * width)
        return split_patches_by_noise(noise, self.cfg.mask_ratio)


def _feature_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, _inputs: LossInputs
) -> LossAndMetrics:
    """Class token, and patches unless they weigh nothing."""
    apart = DISTANCES[objective.cfg.distance]
    cls_B = apart(student_outputs[0].float(), teacher_outputs[0])
    if not objective.cfg.patch_weight:
        return objective.cfg.cls_weight * cls_B, {"cls_distance": cls_B}
    patches_B = apart(student_outputs[1].float(), teacher_outputs[1]).mean(dim=1)
    loss_B = objective.cfg.cls_weight * cls_B + objective.cfg.patch_weight * patches_B
    return loss_B, {"cls_distance": cls_B, "patch_distance": patches_B}


def _layer_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """The mean over pairs of the tokens' mean distance, and the mean error of the masked patches (Bai et al., 2023)."""
    apart = DISTANCES[objective.cfg.distance]
    pairs = zip(student_outputs[: len(teacher_outputs)], teacher_outputs, strict=True)
    token_B = _mean_over_pairs([apart(his.float(), hers).mean(dim=1) for his, hers in pairs])
    if not objective.cfg.pixel_weight:
        return token_B, {"token_distance": token_B}
    assert inputs.masked_indices is not None
    wanted = build_reconstruction_targets(
        inputs.images, inputs.masked_indices, objective.teacher.target.patch, objective.cfg.norm_pix
    )
    pixel_B = patch_mse(student_outputs[-1], wanted).mean(dim=1)
    return token_B + objective.cfg.pixel_weight * pixel_B, {"token_distance": token_B, "pixel_loss": pixel_B}


def _relation_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, _inputs: LossInputs
) -> LossAndMetrics:
    """The mean over pairs of both relations' divergences (Ren et al., 2023)."""
    found = [
        relation_losses(his.float(), hers, objective.teacher.target.heads)
        for his, hers in zip(student_outputs, teacher_outputs, strict=True)
    ]
    qk_B, vv_B = (_mean_over_pairs(each) for each in zip(*found, strict=True))
    return qk_B + vv_B, {"qk_divergence": qk_B, "vv_divergence": vv_B}


def _logit_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """(1 - label_weight) of the teacher's soft labels and label_weight of the labels (Hinton et al., 2015).

    The denominator is all images: one without a label counts with its soft part alone.
    """
    logits, weight = student_outputs[0].float(), objective.cfg.label_weight
    soft_B = soft_target_loss(logits, teacher_outputs[0], objective.cfg.temperature)
    numbers = {"soft_loss": soft_B, "agreement": logits.argmax(dim=1) == teacher_outputs[0].argmax(dim=1)}
    if not weight:
        return soft_B, numbers
    label_B = label_loss(logits, inputs.labels)
    return (1 - weight) * soft_B + weight * label_B, numbers | {"label_loss": label_B}


def _token_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """The class token learns the labels, the distillation token the teacher's guess (Touvron et al., 2021, equation 3).

    The denominator is all images: one without a label counts with the teacher's guess alone.
    """
    (logits, distilled), weight = (each.float() for each in student_outputs), objective.cfg.label_weight
    label_B, guess_B = label_loss(logits, inputs.labels), label_loss(distilled, teacher_outputs[0])
    numbers = {"label_loss": label_B, "guess_loss": guess_B, "agreement": distilled.argmax(dim=1) == teacher_outputs[0]}
    return weight * label_B + (1 - weight) * guess_B, numbers


def _mean_over_pairs(pairs: Sequence[Tensor]) -> Tensor:
    return torch.stack([*pairs]).mean(dim=0)


_LOSSES: dict[DistillMethod, Callable[[DistillationLoss, TensorTuple, TensorTuple, LossInputs], LossAndMetrics]] = {
    "features": _feature_loss,
    "layers": _layer_loss,
    "relations": _relation_loss,
    "logits": _logit_loss,
    "token": _token_loss,
}
