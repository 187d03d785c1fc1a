"""Boxes: the detector that a plan builds, and what it learns from images with boxes, and from images without any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model import encoder_below, groups, model_from_export
from finetune.plan import FinetunePlan
from foveal.data import Batch, normalise
from foveal.models.detect import Detector, build_detector
from foveal.models.droppath import drop_path_sites
from foveal.models.fcos import losses
from foveal.seeding import key, uniforms
from foveal.training.loop import Parts


@dataclass(frozen=True)
class Detect:
    """FCOS's losses, every image divided by its own number of places that answer for an object.

    A mean over images, so that its weight is known without a look at the boxes, and it does not matter which images a
    rank or a micro holds. The paper divides by the places of a whole batch: an image of many objects weighs more there.
    """

    seed: int
    drop_sites: int
    mean: Sequence[float]
    std: Sequence[float]

    def weight(self, batch: Batch) -> float:
        """The number of images."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.marks is not None, "data.labels=boxes reads them"
        drops = uniforms(key(self.seed, "drop path"), batch.draws, self.drop_sites)
        found = losses(model(normalise(batch.images, self.mean, self.std), drops), batch.marks)
        classes, boxes, centres = (each.sum() for each in found)
        return classes + boxes + centres, {"class_loss": classes, "box_loss": boxes, "centre_loss": centres}


def detector(plan: FinetunePlan) -> Detector:
    """The plan's encoder or backbone, as ``encoder_below`` gives it, and a fresh pyramid and head."""
    return build_detector(encoder_below(plan), plan.encoder, detect_head(plan), f"{plan.cfg.init or 'model'}")


def detect(plan: FinetunePlan, _device: torch.device) -> Parts[Detect]:
    """The plan's detector, and what it learns."""
    model = detector(plan)
    return Parts(model, groups(plan, model), Detect(plan.cfg.seed, drop_path_sites(model), plan.mean, plan.std))


def detect_head(plan: FinetunePlan) -> dict[str, Any]:
    """What builds the pyramid and head again."""
    return plan.cfg.detect.card(len(plan.classes)).tree()


def detector_from_export(folder: Path) -> Detector:
    """The model that a run with data.labels=boxes left, in evaluation mode on the CPU. Errors: ExportError."""
    return model_from_export(folder, "detection", build_detector)
