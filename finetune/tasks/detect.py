"""Boxes: the detector that a plan builds, and what it learns from images with boxes, and from images without any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model import encoder_for_dense_head, model_from_export, param_groups_from_plan
from finetune.plan import FinetunePlan
from foveal.data import Batch, normalise
from foveal.models.detect import Detector, build_detector
from foveal.models.droppath import count_drop_paths
from foveal.models.fcos import compute_fcos_losses
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup


@dataclass(frozen=True)
class DetectionLoss:
    """FCOS's losses, every image divided by its own number of places that answer for an object.

    A mean over images, so that its weight is known without a look at the boxes, and it does not matter which images a
    rank or a micro holds. The paper divides by the places of a whole batch: an image of many objects weighs more there.
    """

    seed: int
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]

    def batch_weight(self, batch: Batch) -> float:
        """The number of images."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None, "data.labels=boxes reads them"
        drops = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        found = compute_fcos_losses(model(normalise(batch.images, self.mean, self.std), drops), batch.targets)
        classes, boxes, centres = (each.sum() for each in found)
        return classes + boxes + centres, {"class_loss": classes, "box_loss": boxes, "centre_loss": centres}


def detector_from_plan(plan: FinetunePlan) -> Detector:
    """The plan's encoder or backbone, as ``encoder_below`` gives it, and a fresh pyramid and head."""
    return build_detector(
        encoder_for_dense_head(plan), plan.encoder, detection_head_card(plan), f"{plan.cfg.init or 'model'}"
    )


def build_detection(plan: FinetunePlan, _device: torch.device) -> TrainingSetup[DetectionLoss]:
    """The plan's detector, and what it learns."""
    model = detector_from_plan(plan)
    return TrainingSetup(
        model,
        param_groups_from_plan(plan, model),
        DetectionLoss(plan.cfg.seed, count_drop_paths(model), plan.mean, plan.std),
    )


def detection_head_card(plan: FinetunePlan) -> dict[str, Any]:
    """What builds the pyramid and head again."""
    return plan.cfg.detect.head_card(len(plan.classes)).to_dict()


def detector_from_export(export_dir: Path) -> Detector:
    """The model that a run with data.labels=boxes left, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "detection", build_detector)
