"""The distillation loss of one or several students. B images, L patches, K visible, M masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import DistillConfig
from distill.losses import DISTANCES, label_loss_per_image, relation_losses_per_image
from distill.target import DistillMethod
from distill.teacher import Teacher
from distill.teacher_cache import TeacherCache
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.engines.base import autocast
from foveal.models.patches import build_reconstruction_targets, patch_mse, split_patches_by_noise
from foveal.seeding import derive_key, draw_uniform
from foveal.weights.teacher import distillation_loss_per_image

TensorTuple = tuple[Tensor, ...]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss besides outputs: normalised images [B, C, H, W], masked patches [B, M], labels [B]."""

    images: Tensor
    masked_indices: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """The sum of the students' losses. Masks depend on (seed, epoch, sample id).

    ``student_names`` prefix the metrics; a single student has the empty name.
    """

    teacher: Teacher
    cfg: DistillConfig
    student_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    teacher_cache: TeacherCache | None = None

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of images, with or without a label."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> LossAndMetrics:
        images = normalise(batch.images, self.mean, self.std)
        visible_indices, masked_indices = self.sample_mask_indices(batch)
        teacher_outputs = self.get_teacher_outputs(batch, images, visible_indices)
        inputs = LossInputs(images, masked_indices, batch.labels)
        losses, metrics = [], {}
        all_student_outputs = model(images, visible_indices, masked_indices)
        # Engines differ in whether their autocast includes the objective; losses of small differences need fp32.
        with autocast(images.device, "fp32"):
            for name, student_outputs in zip(self.student_names, all_student_outputs, strict=True):
                loss_B, student_metrics = _LOSSES[self.cfg.method](self, student_outputs, teacher_outputs, inputs)
                if name:
                    student_metrics = student_metrics | {"loss": loss_B}
                prefix = f"{name}/" if name else ""
                metrics |= {f"{prefix}{metric}": value.sum() for metric, value in student_metrics.items()}
                losses.append(loss_B.sum())
        return sum(losses[1:], losses[0]), metrics

    def get_teacher_outputs(self, batch: Batch, images: Tensor, visible_indices: Tensor | None) -> TensorTuple:
        """Return the teacher's outputs, from the cache if it has all rows of the batch."""
        if self.teacher_cache is None:
            return self.teacher(images, visible_indices)
        rows = batch.ids if self.cfg.has_epoch_invariant_targets else batch.sample_keys
        outputs = self.teacher_cache.get_or_compute(rows, lambda: self.teacher(images, visible_indices))
        return tuple(output.to(images.device, non_blocking=True) for output in outputs)

    def sample_mask_indices(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return the indices of visible [B, K] and masked patches [B, M]; (None, None) for methods without masking."""
        if self.cfg.method != "layers":
            return None, None
        height, width = (side // self.teacher.target.patch for side in batch.images.shape[2:])
        noise = draw_uniform(derive_key(self.cfg.seed, "mask"), batch.sample_keys, height * width)
        return split_patches_by_noise(noise, self.cfg.mask_ratio)


def _feature_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, _inputs: LossInputs
) -> LossAndMetrics:
    """Weighted distances of the class token and, if patch_weight is positive, of the patches."""
    distance = DISTANCES[objective.cfg.distance]
    cls_B = distance(student_outputs[0].float(), teacher_outputs[0])
    if not objective.cfg.patch_weight:
        return objective.cfg.cls_weight * cls_B, {"cls_distance": cls_B}
    patches_B = distance(student_outputs[1].float(), teacher_outputs[1]).mean(dim=1)
    loss_B = objective.cfg.cls_weight * cls_B + objective.cfg.patch_weight * patches_B
    return loss_B, {"cls_distance": cls_B, "patch_distance": patches_B}


def _layer_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """Mean or sum over pairs of the tokens' mean distance, plus the mean error of the masked patches.

    The sum is DMAE's, with its distance and pixels (``layer_loss=dmae``; Bai et al., 2023, and their code).
    """
    distance = DISTANCES[objective.cfg.distance]
    pairs = zip(student_outputs[: len(teacher_outputs)], teacher_outputs, strict=True)
    distances = [distance(student.float(), teacher).mean(dim=1) for student, teacher in pairs]
    token_B = _sum_over_pairs(distances) if objective.cfg.layer_loss == "dmae" else _mean_over_pairs(distances)
    if not objective.cfg.pixel_weight:
        return token_B, {"token_distance": token_B}
    assert inputs.masked_indices is not None
    target = build_reconstruction_targets(
        inputs.images, inputs.masked_indices, objective.teacher.target.patch, objective.cfg.norm_pix
    )
    pixel_B = patch_mse(student_outputs[-1], target).mean(dim=1)
    return token_B + objective.cfg.pixel_weight * pixel_B, {"token_distance": token_B, "pixel_loss": pixel_B}


def _relation_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, _inputs: LossInputs
) -> LossAndMetrics:
    """Mean over pairs of both relations' divergences (Ren et al., 2023)."""
    losses = [
        relation_losses_per_image(student.float(), teacher, objective.teacher.target.heads)
        for student, teacher in zip(student_outputs, teacher_outputs, strict=True)
    ]
    qk_B, vv_B = (_mean_over_pairs(pair_losses) for pair_losses in zip(*losses, strict=True))
    return qk_B + vv_B, {"qk_divergence": qk_B, "vv_divergence": vv_B}


def _logit_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """(1 - label_weight) of the teacher's soft labels and label_weight of the labels (Hinton et al., 2015).

    The denominator is all images: an unlabelled image counts with its soft part only.
    """
    logits, weight = student_outputs[0].float(), objective.cfg.label_weight
    soft_B = distillation_loss_per_image(logits, teacher_outputs[0], objective.cfg.temperature)
    metrics = {"soft_loss": soft_B, "teacher_agreement": logits.argmax(dim=1) == teacher_outputs[0].argmax(dim=1)}
    if not weight:
        return soft_B, metrics
    label_B = label_loss_per_image(logits, inputs.labels)
    return (1 - weight) * soft_B + weight * label_B, metrics | {"label_loss": label_B}


def _token_loss(
    objective: DistillationLoss, student_outputs: TensorTuple, teacher_outputs: TensorTuple, inputs: LossInputs
) -> LossAndMetrics:
    """The class token learns the labels, the distillation token the teacher's class (Touvron et al., 2021, equation 3).

    The denominator is all images: an unlabelled image counts with the teacher's class only.
    """
    cls_logits, token_logits = (logits.float() for logits in student_outputs)
    weight, teacher_classes = objective.cfg.label_weight, teacher_outputs[0]
    label_B, teacher_B = (
        label_loss_per_image(cls_logits, inputs.labels),
        label_loss_per_image(token_logits, teacher_classes),
    )
    agreement_B = token_logits.argmax(dim=1) == teacher_classes
    metrics = {"label_loss": label_B, "guess_loss": teacher_B, "teacher_agreement": agreement_B}
    return weight * label_B + (1 - weight) * teacher_B, metrics


def _mean_over_pairs(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([*losses]).mean(dim=0)


def _sum_over_pairs(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([*losses]).sum(dim=0)


_LOSSES: dict[DistillMethod, Callable[[DistillationLoss, TensorTuple, TensorTuple, LossInputs], LossAndMetrics]] = {
    "features": _feature_loss,
    "layers": _layer_loss,
    "relations": _relation_loss,
    "logits": _logit_loss,
    "token": _token_loss,
}
