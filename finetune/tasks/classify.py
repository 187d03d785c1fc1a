"""Cross-entropy on classes; images without a label count for nothing. B images, K classes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig
from finetune.model import classifier_from_plan, param_groups_from_plan
from finetune.plan import FinetunePlan
from finetune.regularizers.adversarial import Attack, build_attack
from finetune.regularizers.mixup import apply_mixup_cutmix, apply_random_erasing, mix_with_partners
from finetune.regularizers.teacher import TeacherLoss, build_teacher_loss
from foveal.data import Batch, LabelKind, normalise
from foveal.models.batch_norm import preserve_batch_norm_stats, use_auxiliary_batch_norms
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup

_UNLABELLED = -1


@dataclass(frozen=True)
class ClassificationLoss:
    """The loss of one class an image (softmax), or of several (binary). Draws depend on (seed, epoch, sample id), on no rank.

    ``weights`` [K] are the classes'. ``attack`` and ``teacher`` are there where the settings ask for them.
    """

    cfg: FinetuneConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drop_noise_size: int
    class_weights: Tensor
    attack: Attack | None = None
    teacher: TeacherLoss | None = None

    def batch_weight(self, batch: Batch) -> Tensor:
        """The sum of the images' weights: 1, or that of the class; of an image without a label 0, of several classes 1."""
        if batch.targets is not None:
            return (batch.ids >= 0).sum()
        known = batch.labels != _UNLABELLED
        return self.class_weights.to(batch.labels.device)[batch.labels.clamp(min=0)].masked_fill(~known, 0.0).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, goals_BK = self.prepare_batch(batch)
        draws = draw_uniform(derive_key(self.cfg.seed, "drop path"), batch.sample_keys, self.drop_noise_size)

        def loss(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The labels' loss and logits, and the logits that a teacher's token has, or the same ones again."""
            answer = model(images, draws)
            logits_BK, token_BK = (each.float() for each in (answer if isinstance(answer, tuple) else (answer, answer)))
            terms_BK = _LOSS_TERMS[self.cfg.data.labels](logits_BK, goals_BK)
            return (terms_BK * self._class_weights_on(logits_BK)).sum(), logits_BK, token_BK

        total, logits_BK, token_BK = loss(images)
        numbers = {"train_top1": self._sum_correct(logits_BK, goals_BK)}
        if self.teacher is not None:
            taught = (self.teacher(images, token_BK) * self._image_weights(goals_BK)).sum()
            weight = self.teacher.cfg.weight
            total = (1 - weight) * total + weight * taught
            numbers["teacher_loss"] = taught
        if self.attack is not None:
            weight = self.attack.cfg.weight
            with use_auxiliary_batch_norms(model, enabled=True):
                with preserve_batch_norm_stats(model):
                    attacked = self.attack(lambda images: loss(images)[0], images, batch.sample_keys)
                worst, logits_BK, _ = loss(attacked)
            total = (1 - weight) * total + weight * worst
            numbers |= {"adversarial_loss": worst, "adversarial_top1": self._sum_correct(logits_BK, goals_BK)}
        return total, numbers

    def prepare_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the model sees of a batch: normalised images, erased and mixed as the settings say, and their goals [B, K]."""
        cfg, images = self.cfg, normalise(batch.images, self.mean, self.std)
        goals_BK = _TARGETS[cfg.data.labels](batch, len(self.class_weights), cfg.label_smoothing)
        if cfg.erase:
            images = apply_random_erasing(images, batch.sample_keys, cfg.seed, cfg.erase)
        if cfg.mixup or cfg.cutmix:
            how = {"mixup": cfg.mixup, "cutmix": cfg.cutmix, "cutmix_share": cfg.cutmix_share}
            images, own_B = apply_mixup_cutmix(images, batch.sample_keys, cfg.seed, **how)
            goals_BK = mix_with_partners(goals_BK, own_B[:, None])
        return images, goals_BK

    def _image_weights(self, targets_BK: Tensor) -> Tensor:
        """What each image's loss weighs, [B]."""
        return (targets_BK * self._class_weights_on(targets_BK)).sum(dim=1)

    def _sum_correct(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """What is right of a micro's weight: images whose likeliest class is their goals' largest, and there is a goal."""
        guesses_B1 = logits_BK.argmax(dim=1, keepdim=True)
        found_B1 = targets_BK.gather(1, guesses_B1)
        right_B1 = (found_B1 == targets_BK.amax(dim=1, keepdim=True)) & (found_B1 > 0)
        if self.cfg.data.labels == "classes":  # every image weighs 1
            return right_B1.sum()
        return (right_B1 * self._class_weights_on(logits_BK)[guesses_B1]).sum()

    def _class_weights_on(self, like: Tensor) -> Tensor:
        """The classes' weights where a tensor is, and nothing waited for."""
        return self.class_weights.to(like.device, non_blocking=True)


def build_classification(plan: FinetunePlan, device: torch.device) -> TrainingSetup[ClassificationLoss]:
    """The plan's classifier and what it learns, and a teacher on the device if it has one."""
    cfg, attack, model = plan.cfg, build_attack(plan), classifier_from_plan(plan)
    if cfg.adversarial is not None and not cfg.adversarial.weight:
        attack = None  # it is only measured
    weights = torch.tensor(plan.class_weights)  # on the host, where batches are weighed
    teacher = build_teacher_loss(cfg, plan.teacher, device)
    objective = ClassificationLoss(cfg, plan.mean, plan.std, model.drop_noise_size, weights, attack, teacher)
    return TrainingSetup(
        model, param_groups_from_plan(plan, model), objective, () if teacher is None else (teacher.model,)
    )


@torch.no_grad()
def sum_batch_metrics(logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor) -> Tensor:
    """Counts over a batch, float64 [4]: right at first guess, right among five, summed cross-entropy, images."""
    known_B = valid_B & (labels_B != _UNLABELLED)
    guesses_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    right_B5 = (guesses_B5 == labels_B[:, None]) & known_B[:, None]
    losses_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=_UNLABELLED) * known_B
    return torch.stack([right_B5[:, 0].sum(), right_B5.sum(), losses_B.double().sum(), known_B.sum()]).double()


def _single_label_targets(batch: Batch, classes: int, smoothing: float) -> Tensor:
    """The label, and a share of all classes; nothing where there is no label."""
    known_B1 = (batch.labels != _UNLABELLED)[:, None]
    goals_BK = F.one_hot(batch.labels.clamp(min=0), classes).float()
    return ((1 - smoothing) * goals_BK + smoothing / classes) * known_B1


def _multi_label_targets(batch: Batch, _classes: int, smoothing: float) -> Tensor:
    """The classes that are there, each answer pulled towards a half."""
    assert batch.targets is not None
    return (1 - smoothing) * batch.targets.float() + smoothing / 2


def _softmax_loss_terms(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    return -targets_BK * logits_BK.log_softmax(dim=1)


def _binary_loss_terms(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """The mean over classes."""
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none") / logits_BK.shape[1]


_TARGETS: dict[LabelKind, Callable[[Batch, int, float], Tensor]] = {
    "class": _single_label_targets,
    "classes": _multi_label_targets,
}
_LOSS_TERMS: dict[LabelKind, Callable[[Tensor, Tensor], Tensor]] = {
    "class": _softmax_loss_terms,
    "classes": _binary_loss_terms,
}
