"""Semantic segmentation: cross-entropy of every pixel; pixels without a label count for nothing.

B images of H x W pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model import encoder_for_dense_head, model_from_export, param_groups_from_plan
from finetune.plan import FinetunePlan
from foveal.data import Batch, normalise
from foveal.data.image.targets import NO_CLASS
from foveal.models.droppath import count_drop_paths
from foveal.models.segment import Segmenter, build_segmenter
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup


@dataclass(frozen=True)
class SegmentationLoss:
    """Softmax cross-entropy of pixels. Which sample skips which block depends on (seed, epoch, sample id), on no rank.

    ``weights`` [K] are the classes', on the host.
    """

    seed: int
    label_smoothing: float
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]
    class_weights: Tensor

    def batch_weight(self, batch: Batch) -> Tensor:
        """The sum of the weights of the pixels that have a label: 1, or that of the class."""
        marks = _targets_of(batch)
        return (
            torch.bincount(marks[marks != NO_CLASS], minlength=len(self.class_weights)) * self.class_weights.double()
        ).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, marks_BHW = normalise(batch.images, self.mean, self.std), _targets_of(batch).long()
        drops = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        logits_BKHW = model(images, drops).float()
        weights = self.class_weights.to(logits_BKHW.device, non_blocking=True)
        told = {"weight": weights, "ignore_index": NO_CLASS, "label_smoothing": self.label_smoothing}
        # Summed behind it: torch's own sum over an image's pixels has no order on a GPU.
        losses_BHW = F.cross_entropy(logits_BKHW, marks_BHW, reduction="none", **told)
        guesses_BHW = logits_BKHW.argmax(dim=1)
        right_BHW = (guesses_BHW == marks_BHW) * weights[guesses_BHW]
        return losses_BHW.sum(), {"train_pixels": right_BHW.sum()}


def segmenter_from_plan(plan: FinetunePlan) -> Segmenter:
    """The plan's encoder or backbone, with its weights where there is an export, and a head freshly drawn after it."""
    return build_segmenter(
        encoder_for_dense_head(plan), plan.encoder, segmentation_head_card(plan), plan.cfg.init or "model"
    )


def build_segmentation(plan: FinetunePlan, _device: torch.device) -> TrainingSetup[SegmentationLoss]:
    """The plan's segmenter, and what it learns."""
    model = segmenter_from_plan(plan)
    cfg, weights = plan.cfg, torch.tensor(plan.class_weights)
    objective = SegmentationLoss(cfg.seed, cfg.label_smoothing, count_drop_paths(model), plan.mean, plan.std, weights)
    return TrainingSetup(model, param_groups_from_plan(plan, model), objective)


def segmentation_head_card(plan: FinetunePlan) -> dict[str, Any]:
    """What builds the head again."""
    return plan.cfg.segment.head_card(len(plan.classes)).to_dict()


def segmenter_from_export(export_dir: Path) -> Segmenter:
    """The model that a run with data.labels=mask left, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "segmentation", build_segmenter)


def _targets_of(batch: Batch) -> Tensor:
    assert batch.targets is not None, "data.labels=mask gives every batch its masks"
    return batch.targets
