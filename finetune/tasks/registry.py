"""Table of fine-tuning tasks by label kind: model and objective, metrics, head card."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune.plan import FinetunePlan
from finetune.tasks.classify import build_classification
from finetune.tasks.classify_metrics import compute_classification_metrics, compute_multilabel_metrics
from finetune.tasks.detect import build_detection, detection_head_card
from finetune.tasks.detect_metrics import compute_detection_metrics
from finetune.tasks.segment import build_segmentation, segmentation_head_card
from finetune.tasks.segment_metrics import compute_segmentation_metrics
from foveal.data.config import LabelKind
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run


class ComputeMetrics(Protocol):
    """Compute metrics on a subset of a split after a step, each sample once. Every rank must call it."""

    def __call__(self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName) -> dict[str, float]: ...


def _no_head_card(_plan: FinetunePlan) -> None:
    """Return None: a classification head is part of the encoder, whose card describes it."""


@dataclass(frozen=True)
class Task:
    """A fine-tuning task.

    ``build``: model, parameter groups and objective of a plan, for a device. ``head_card``: card of a head outside the
    encoder, or None.
    """

    build: Callable[[FinetunePlan, torch.device], TrainingSetup[Any]]
    compute_metrics: ComputeMetrics
    head_card: Callable[[FinetunePlan], dict[str, Any] | None] = _no_head_card


TASKS: dict[LabelKind, Task] = {
    "class": Task(build_classification, compute_classification_metrics),
    "classes": Task(build_classification, compute_multilabel_metrics),
    "mask": Task(build_segmentation, compute_segmentation_metrics, segmentation_head_card),
    "boxes": Task(build_detection, compute_detection_metrics, detection_head_card),
}
