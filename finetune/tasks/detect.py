"""Object detection: the detector that a plan builds, and its objective on images with and without boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model import encoder_for_dense_head, model_from_export, param_groups_from_plan
from finetune.plan import FinetunePlan
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.models.detect import Detector, build_detector
from foveal.models.droppath import count_drop_paths
from foveal.models.fcos import fcos_losses_per_image
from foveal.seeding import derive_key, draw_uniform
from foveal.training.loop import TrainingSetup


@dataclass(frozen=True)
class DetectionLoss:
    """FCOS losses, normalized per image by its number of positive locations.

    The loss is a mean over images, so that the batch weight does not depend on the boxes, and the split of a step into
    ranks and microbatches does not matter. The paper divides by the positive locations of the batch, so that an image
    with many objects weighs more.
    """

    seed: int
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of images."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None, "data.labels=boxes reads targets"
        drop_noise = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        losses = fcos_losses_per_image(model(normalise(batch.images, self.mean, self.std), drop_noise), batch.targets)
        class_loss, box_loss, centre_loss = (loss_B.sum() for loss_B in losses)
        return class_loss + box_loss + centre_loss, {
            "class_loss": class_loss,
            "box_loss": box_loss,
            "centre_loss": centre_loss,
        }


def detector_from_plan(plan: FinetunePlan) -> Detector:
    """Return the plan's encoder (see ``encoder_for_dense_head``) with a newly initialized pyramid and head."""
    return build_detector(
        encoder_for_dense_head(plan), plan.encoder, detection_head_card(plan), f"{plan.cfg.init or 'model'}"
    )


def build_detection(plan: FinetunePlan, _device: torch.device) -> TrainingSetup[DetectionLoss]:
    """Return the plan's detector with its objective."""
    model = detector_from_plan(plan)
    return TrainingSetup(
        model,
        param_groups_from_plan(plan, model),
        DetectionLoss(plan.cfg.seed, count_drop_paths(model), plan.mean, plan.std),
    )


def detection_head_card(plan: FinetunePlan) -> dict[str, Any]:
    """Return the card of the pyramid and head."""
    return plan.cfg.detect.head_card(len(plan.classes)).to_dict()


def detector_from_export(export_dir: Path) -> Detector:
    """Return an exported detector, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "detection", build_detector)
