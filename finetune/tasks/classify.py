"""Image classification, one class (softmax) or several classes (binary) per image. B images, K classes.

Images without a label have weight 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig
from finetune.model import classifier_from_plan, param_groups_from_plan
from finetune.plan import FinetunePlan
from finetune.regularizers.adversarial import Attack, build_attack
from finetune.regularizers.mixup import apply_mixup_cutmix, apply_random_erasing, mix_adjacent_pairs
from finetune.regularizers.teacher import TeacherLoss, build_teacher_loss
from foveal.data.batch import Batch
from foveal.data.config import LabelKind
from foveal.data.image.transforms import normalise
from foveal.models.batch_norm import preserve_batch_norm_stats, use_auxiliary_batch_norms
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup

_UNLABELLED = -1


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy of one class per image (softmax) or of several (binary), weighted by ``class_weights`` [K].

    ``attack`` and ``teacher`` add their losses if set. Randomness is keyed by (seed, epoch, sample id), not by rank.
    """

    cfg: FinetuneConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drop_noise_per_image: int
    class_weights: Tensor
    attack: Attack | None = None
    teacher: TeacherLoss | None = None

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return the sum of image weights: class weight, or 0 without a label; with several classes 1 per image."""
        if batch.targets is not None:
            return (batch.ids >= 0).sum()
        labelled = batch.labels != _UNLABELLED
        return self.class_weights.to(batch.labels.device)[batch.labels.clamp(min=0)].masked_fill(~labelled, 0.0).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets_BK = self.prepare_batch(batch)
        drop_noise = draw_uniform(derive_key(self.cfg.seed, "drop path"), batch.sample_keys, self.drop_noise_per_image)

        def loss(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return the label loss, its logits, and the distillation token's logits (the same without a token)."""
            output = model(images, drop_noise)
            logits_BK, token_logits_BK = output if isinstance(output, tuple) else (output, output)
            logits_BK, token_logits_BK = logits_BK.float(), token_logits_BK.float()
            terms_BK = _LOSS_TERMS[self.cfg.data.labels](logits_BK, targets_BK)
            return (terms_BK * self._class_weights_on(logits_BK)).sum(), logits_BK, token_logits_BK

        total, logits_BK, token_logits_BK = loss(images)
        metrics = {"train_top1": self._sum_correct(logits_BK, targets_BK)}
        if self.teacher is not None:
            teacher_loss = (self.teacher(images, token_logits_BK) * self._image_weights(targets_BK)).sum()
            weight = self.teacher.cfg.weight
            total = (1 - weight) * total + weight * teacher_loss
            metrics["teacher_loss"] = teacher_loss
        if self.attack is not None:
            weight = self.attack.cfg.weight
            with use_auxiliary_batch_norms(model, enabled=True):
                with preserve_batch_norm_stats(model):
                    attacked = self.attack(lambda images: loss(images)[0], images, batch.sample_keys)
                adversarial_loss, logits_BK, _ = loss(attacked)
            total = (1 - weight) * total + weight * adversarial_loss
            metrics["adversarial_loss"] = adversarial_loss
            metrics["adversarial_top1"] = self._sum_correct(logits_BK, targets_BK)
        return total, metrics

    def prepare_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return normalised images after random erasing, mixup and cutmix, and their targets [B, K]."""
        cfg, images = self.cfg, normalise(batch.images, self.mean, self.std)
        targets_BK = _TARGETS[cfg.data.labels](batch, len(self.class_weights), cfg.label_smoothing)
        if cfg.random_erasing:
            images = apply_random_erasing(images, batch.sample_keys, cfg.seed, cfg.random_erasing)
        if cfg.mixup or cfg.cutmix:
            images, own_B = apply_mixup_cutmix(
                images,
                batch.sample_keys,
                cfg.seed,
                mixup=cfg.mixup,
                cutmix=cfg.cutmix,
                cutmix_share=cfg.mixup_switch_prob,
            )
            targets_BK = mix_adjacent_pairs(targets_BK, own_B[:, None])
        return images, targets_BK

    def _image_weights(self, targets_BK: Tensor) -> Tensor:
        """Return the weight of each image, [B]."""
        return (targets_BK * self._class_weights_on(targets_BK)).sum(dim=1)

    def _sum_correct(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the total weight of the images whose predicted class has the largest target, which is not 0."""
        predictions_B1 = logits_BK.argmax(dim=1, keepdim=True)
        predicted_targets_B1 = targets_BK.gather(1, predictions_B1)
        largest_B1 = targets_BK.amax(dim=1, keepdim=True)
        correct_B1 = (predicted_targets_B1 == largest_B1) & (predicted_targets_B1 > 0)
        if self.cfg.data.labels == "classes":  # the weight of every image is 1
            return correct_B1.sum()
        return (correct_B1 * self._class_weights_on(logits_BK)[predictions_B1]).sum()

    def _class_weights_on(self, like: Tensor) -> Tensor:
        """Return the class weights on the device of a tensor, copied without blocking."""
        return self.class_weights.to(like.device, non_blocking=True)


def build_classification(plan: FinetunePlan, device: torch.device) -> TrainingSetup[ClassificationLoss]:
    """Return the plan's classifier with its objective; the teacher, if any, is on the device."""
    cfg, attack, model = plan.cfg, build_attack(plan), classifier_from_plan(plan)
    if cfg.adversarial is not None and not cfg.adversarial.weight:
        attack = None  # only evaluation attacks images
    weights = torch.tensor(plan.class_weights)  # on the host, where ``batch_weight`` reads them
    teacher = build_teacher_loss(cfg, plan.teacher, device)
    objective = ClassificationLoss(cfg, plan.mean, plan.std, model.drop_noise_per_image, weights, attack, teacher)
    return TrainingSetup(
        model, param_groups_from_plan(plan, model), objective, () if teacher is None else (teacher.model,)
    )


@torch.no_grad()
def sum_batch_metrics(logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor) -> Tensor:
    """Return sums over labelled images, float64 [4]: top-1 correct, top-5 correct, cross-entropy, images."""
    labelled_B = valid_B & (labels_B != _UNLABELLED)
    predictions_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    correct_B5 = (predictions_B5 == labels_B[:, None]) & labelled_B[:, None]
    losses_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=_UNLABELLED) * labelled_B
    return torch.stack([correct_B5[:, 0].sum(), correct_B5.sum(), losses_B.double().sum(), labelled_B.sum()]).double()


def _single_label_targets(batch: Batch, num_classes: int, smoothing: float) -> Tensor:
    """Return smoothed one-hot targets [B, K]; zeros for an image without a label."""
    labelled_B1 = (batch.labels != _UNLABELLED)[:, None]
    one_hot_BK = F.one_hot(batch.labels.clamp(min=0), num_classes).float()
    return ((1 - smoothing) * one_hot_BK + smoothing / num_classes) * labelled_B1


def _multi_label_targets(batch: Batch, _num_classes: int, smoothing: float) -> Tensor:
    """Return multi-hot targets [B, K], smoothed towards 1/2."""
    assert batch.targets is not None
    return (1 - smoothing) * batch.targets.float() + smoothing / 2


def _softmax_loss_terms(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Return the terms [B, K] whose sum over classes is the cross-entropy."""
    return -targets_BK * logits_BK.log_softmax(dim=1)


def _binary_loss_terms(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Return the terms [B, K] whose sum over classes is the mean binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none") / logits_BK.shape[1]


_TARGETS: dict[LabelKind, Callable[[Batch, int, float], Tensor]] = {
    "class": _single_label_targets,
    "classes": _multi_label_targets,
}
_LOSS_TERMS: dict[LabelKind, Callable[[Tensor, Tensor], Tensor]] = {
    "class": _softmax_loss_terms,
    "classes": _binary_loss_terms,
}
