"""Semantic segmentation: the segmenter that a plan builds, and its pixel-wise cross-entropy.

Pixels without a label are ignored. B images of H x W pixels, K classes.
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
from foveal.data.batch import Batch
from foveal.data.image.targets import NO_CLASS
from foveal.data.image.transforms import normalise
from foveal.models.droppath import count_drop_paths
from foveal.models.segment import Segmenter, build_segmenter
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup


@dataclass(frozen=True)
class SegmentationLoss:
    """Pixel-wise softmax cross-entropy, weighted by ``class_weights`` [K], on the host.

    Drop path is keyed by (seed, epoch, sample id), not by rank.
    """

    seed: int
    label_smoothing: float
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]
    class_weights: Tensor

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return the sum of the class weights of all labelled pixels."""
        targets = _targets_of(batch)
        counts = torch.bincount(targets[targets != NO_CLASS], minlength=len(self.class_weights))
        return (counts * self.class_weights.double()).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets_BHW = normalise(batch.images, self.mean, self.std), _targets_of(batch).long()
        drop_noise = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        logits_BKHW = model(images, drop_noise).float()
        weights = self.class_weights.to(logits_BKHW.device, non_blocking=True)
        losses_BHW = F.cross_entropy(
            logits_BKHW,
            targets_BHW,
            weight=weights,
            ignore_index=NO_CLASS,
            reduction="none",  # the reduction inside cross_entropy sums pixels in no fixed order on a GPU
            label_smoothing=self.label_smoothing,
        )
        predictions_BHW = logits_BKHW.argmax(dim=1)
        correct_BHW = (predictions_BHW == targets_BHW) * weights[predictions_BHW]
        return losses_BHW.sum(), {"train_pixels": correct_BHW.sum()}


def segmenter_from_plan(plan: FinetunePlan) -> Segmenter:
    """Return the plan's encoder or backbone with a newly initialized segmentation head."""
    return build_segmenter(
        encoder_for_dense_head(plan), plan.encoder, segmentation_head_card(plan), plan.cfg.init or "model"
    )


def build_segmentation(plan: FinetunePlan, _device: torch.device) -> TrainingSetup[SegmentationLoss]:
    """Return the plan's segmenter with its objective."""
    model = segmenter_from_plan(plan)
    cfg, weights = plan.cfg, torch.tensor(plan.class_weights)
    objective = SegmentationLoss(cfg.seed, cfg.label_smoothing, count_drop_paths(model), plan.mean, plan.std, weights)
    return TrainingSetup(model, param_groups_from_plan(plan, model), objective)


def segmentation_head_card(plan: FinetunePlan) -> dict[str, Any]:
    """Return the card of the head."""
    return plan.cfg.segment.head_card(len(plan.classes)).to_dict()


def segmenter_from_export(export_dir: Path) -> Segmenter:
    """Return an exported segmenter, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "segmentation", build_segmenter)


def _targets_of(batch: Batch) -> Tensor:
    """Return the masks of a batch, int16 [B, H, W]."""
    assert batch.targets is not None, "data.labels=mask reads masks as targets"
    return batch.targets
