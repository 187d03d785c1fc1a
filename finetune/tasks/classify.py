"""Image classification: one class per image, by softmax. B images, K classes.

Images without a label have weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig
from finetune.evaluation_details import EvaluationDetails
from finetune.model import classifier_from_plan, param_groups_from_plan
from finetune.regularizers.adversarial import Attack, build_attack
from finetune.regularizers.mixup import apply_mixup_cutmix, mix_adjacent_pairs
from finetune.regularizers.random_erasing import apply_random_erasing
from finetune.regularizers.teacher import TeacherLoss, build_teacher_loss
from finetune.task import TASK_SETTINGS, FinetunePlan, Task
from finetune.tasks.classify_details import ClassificationDetails
from finetune.tasks.classify_metrics import UNLABELLED, compute_classification_metrics
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import LabelReader
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.inference.exported_model import ExportedModel
from foveal.inference.image_transform import ImageFrame
from foveal.inference.predictions import Columns, Prediction, round_float32
from foveal.models.backbone import check_classifier_training
from foveal.models.batch_norm import preserve_batch_norm_stats, use_auxiliary_batch_norms
from foveal.seeding import derive_key, draw_uniform
from foveal.training.evaluations import Metric
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_PREDICTED_CLASSES = 5  # rows of an image, unless --top says how many


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy of one class per image (softmax), weighted by ``class_weights`` [K].

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
        """Return the sum of image weights: the weight of the image's class, or 0 without a label."""
        labelled = batch.labels != UNLABELLED
        return self.class_weights.to(batch.labels.device)[batch.labels.clamp(min=0)].masked_fill(~labelled, 0.0).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets_BK = self.prepare_batch(batch)
        drop_noise = draw_uniform(derive_key(self.cfg.seed, "drop path"), batch.sample_keys, self.drop_noise_per_image)

        def loss(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return the label loss, its logits, and the distillation token's logits (the same without a token)."""
            output = model(images, drop_noise)
            logits_BK, token_logits_BK = output if isinstance(output, tuple) else (output, output)
            logits_BK, token_logits_BK = logits_BK.float(), token_logits_BK.float()
            terms_BK = self.compute_loss_terms(logits_BK, targets_BK)
            return (terms_BK * self.class_weights_on(logits_BK)).sum(), logits_BK, token_logits_BK

        total, logits_BK, token_logits_BK = loss(images)
        metrics = {"train_top1": self.sum_correct(logits_BK, targets_BK)}
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
            metrics["adversarial_top1"] = self.sum_correct(logits_BK, targets_BK)
        return total, metrics

    def prepare_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return normalised images after random erasing, mixup and cutmix, and their targets [B, K]."""
        cfg, images = self.cfg, normalise(batch.images, self.mean, self.std)
        targets_BK = self.compute_targets(batch)
        if cfg.random_erasing:
            images = apply_random_erasing(
                images, batch.sample_keys, cfg.seed, cfg.random_erasing, cfg.random_erasing_boxes
            )
        if cfg.mixup or cfg.cutmix:
            images, own_B = apply_mixup_cutmix(
                images,
                batch.sample_keys,
                cfg.seed,
                mixup=cfg.mixup,
                cutmix=cfg.cutmix,
                switch_prob=cfg.mixup_switch_prob,
            )
            targets_BK = mix_adjacent_pairs(targets_BK, own_B[:, None])
        return images, targets_BK

    def compute_targets(self, batch: Batch) -> Tensor:
        """Return smoothed one-hot targets [B, K]; zeros for an image without a label."""
        num_classes, smoothing = len(self.class_weights), self.cfg.label_smoothing
        labelled_B1 = (batch.labels != UNLABELLED)[:, None]
        one_hot_BK = F.one_hot(batch.labels.clamp(min=0), num_classes).float()
        return ((1 - smoothing) * one_hot_BK + smoothing / num_classes) * labelled_B1

    def compute_loss_terms(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the terms [B, K] whose sum over classes is the cross-entropy."""
        return -targets_BK * logits_BK.log_softmax(dim=1)

    def sum_correct(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the total weight of the images that are classified correctly."""
        predictions_B1 = logits_BK.argmax(dim=1, keepdim=True)
        correct_B1 = is_largest_target(predictions_B1, targets_BK)
        return (correct_B1 * self.class_weights_on(logits_BK)[predictions_B1]).sum()

    def _image_weights(self, targets_BK: Tensor) -> Tensor:
        """Return the weight of each image, [B]."""
        return (targets_BK * self.class_weights_on(targets_BK)).sum(dim=1)

    def class_weights_on(self, like: Tensor) -> Tensor:
        """Return the class weights on the device of a tensor, copied without blocking."""
        return self.class_weights.to(like.device, non_blocking=True)


def is_largest_target(predictions_B1: Tensor, targets_BK: Tensor) -> Tensor:
    """Return whether the predicted class of each image has its largest target, which is not 0, bool [B, 1]."""
    predicted_targets_B1 = targets_BK.gather(1, predictions_B1)
    return (predicted_targets_B1 == targets_BK.amax(dim=1, keepdim=True)) & (predicted_targets_B1 > 0)


class Classification(Task):
    """One class per image, which is in the index."""

    name = "classification"
    predicts_classes = True
    min_classes = 2
    has_index_labels = True
    supported_settings = frozenset(TASK_SETTINGS) - {"data.eval_size", "data.label_field"}
    prediction_columns: ClassVar[Columns] = {"class": str, "score": float}
    loss_class = ClassificationLoss

    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader | None:
        return None

    def check_model(self, plan: FinetunePlan) -> None:
        if plan.backbone is not None:
            card, size = plan.backbone, plan.microbatch_size
            # A frozen backbone has no training forward of its own, so that a microbatch of 1 is no error there.
            check_classifier_training(*card.build_args, card.classes, max(2, size) if plan.cfg.freeze_encoder else size)

    def build(self, plan: FinetunePlan, device: torch.device) -> TrainingSetup[Any]:
        cfg, attack, model = plan.cfg, build_attack(plan), classifier_from_plan(plan)
        if cfg.adversarial is not None and not cfg.adversarial.weight:
            attack = None  # only evaluation attacks images
        weights = torch.tensor(plan.class_weights)  # on the host, where ``batch_weight`` reads them
        teacher = build_teacher_loss(cfg, plan.teacher, device)
        objective = self.loss_class(cfg, plan.mean, plan.std, model.drop_noise_per_image, weights, attack, teacher)
        return TrainingSetup(
            model, param_groups_from_plan(plan, model), objective, () if teacher is None else (teacher.model,)
        )

    def num_encoder_outputs(self, classes: tuple[str, ...]) -> int:
        return len(classes)

    def head_card(self, plan: FinetunePlan) -> None:
        """Return None: the head is part of the encoder, whose card describes it."""

    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        robust = () if cfg.adversarial is None else (Metric("robust_top1", higher_is_better=True),)
        return (
            Metric("top1", higher_is_better=True),
            Metric("top5", higher_is_better=True),
            Metric("loss", higher_is_better=False),
            *robust,
        )

    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        return compute_classification_metrics(engine, run, step, split=split, subset=subset)

    def compute_metrics_and_details(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> tuple[dict[str, float], EvaluationDetails | None]:
        plan = cast(FinetunePlan, run.plan)
        details = ClassificationDetails(plan.classes, engine.device)
        metrics = compute_classification_metrics(engine, run, step, split=split, subset=subset, observe=details.update)
        return metrics, details

    def compute_scores(self, logits_BK: Tensor) -> Tensor:
        """Return the probability of each class, [B, K]: softmax."""
        return logits_BK.float().softmax(dim=1)

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        scores_BK = self.compute_scores(model.module(images))
        num_classes = scores_BK.shape[1]
        names = model.classes or tuple(map(str, range(num_classes)))  # a foreign head states no names
        best = scores_BK.topk(min(_PREDICTED_CLASSES if top is None else top, num_classes), dim=1)
        return [
            Prediction(
                tuple(
                    {"class": names[label], "score": round_float32(score)}
                    for label, score in zip(labels, scores, strict=True)
                )
            )
            for labels, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
