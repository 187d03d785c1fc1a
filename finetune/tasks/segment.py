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

from finetune.model import encoder_below, groups, model_from_export
from finetune.plan import FinetunePlan
from foveal.data import Batch, normalise
from foveal.data.image.targets import NOTHING
from foveal.models.droppath import drop_path_sites
from foveal.models.segment import Segmenter, build_segmenter
from foveal.seeding import key, uniforms
from foveal.training.loop import Parts


@dataclass(frozen=True)
class Segment:
    """Softmax cross-entropy of pixels. Which sample skips which block depends on (seed, epoch, sample id), on no rank.

    ``weights`` [K] are the classes', on the host.
    """

    seed: int
    label_smoothing: float
    drop_sites: int
    mean: Sequence[float]
    std: Sequence[float]
    weights: Tensor

    def weight(self, batch: Batch) -> Tensor:
        """The sum of the weights of the pixels that have a label: 1, or that of the class."""
        marks = _marks(batch)
        return (torch.bincount(marks[marks != NOTHING], minlength=len(self.weights)) * self.weights.double()).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, marks_BHW = normalise(batch.images, self.mean, self.std), _marks(batch).long()
        drops = uniforms(key(self.seed, "drop path"), batch.draws, self.drop_sites)
        logits_BKHW = model(images, drops).float()
        weights = self.weights.to(logits_BKHW.device, non_blocking=True)
        told = {"weight": weights, "ignore_index": NOTHING, "label_smoothing": self.label_smoothing}
        # Summed behind it: torch's own sum over an image's pixels has no order on a GPU.
        losses_BHW = F.cross_entropy(logits_BKHW, marks_BHW, reduction="none", **told)
        guesses_BHW = logits_BKHW.argmax(dim=1)
        right_BHW = (guesses_BHW == marks_BHW) * weights[guesses_BHW]
        return losses_BHW.sum(), {"train_pixels": right_BHW.sum()}


def segmenter(plan: FinetunePlan) -> Segmenter:
    """The plan's encoder or backbone, with its weights where there is an export, and a head freshly drawn after it."""
    return build_segmenter(encoder_below(plan), plan.encoder, segment_head(plan), plan.cfg.init or "model")


def segment(plan: FinetunePlan, _device: torch.device) -> Parts[Segment]:
    """The plan's segmenter, and what it learns."""
    model = segmenter(plan)
    cfg, weights = plan.cfg, torch.tensor(plan.class_weights)
    objective = Segment(cfg.seed, cfg.label_smoothing, drop_path_sites(model), plan.mean, plan.std, weights)
    return Parts(model, groups(plan, model), objective)


def segment_head(plan: FinetunePlan) -> dict[str, Any]:
    """What builds the head again."""
    return plan.cfg.segment.card(len(plan.classes)).tree()


def segmenter_from_export(folder: Path) -> Segmenter:
    """The model that a run with data.labels=mask left, in evaluation mode on the CPU. Errors: ExportError."""
    return model_from_export(folder, "segmentation", build_segmenter)


def _marks(batch: Batch) -> Tensor:
    assert batch.marks is not None, "data.labels=mask gives every batch its masks"
    return batch.marks
