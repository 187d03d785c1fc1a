"""What the kind of a sample's label makes of fine-tuning: a model, what it learns, and how well it does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from finetune.accuracy import accuracy, precision
from finetune.coco import average_precision
from finetune.detect import detect, detect_head, detector
from finetune.model import classifier
from finetune.objective import classify
from finetune.overlap import overlap
from finetune.planning import FinetunePlan
from finetune.segment import segment, segment_head, segmenter
from foveal.data import LabelKind
from foveal.data.subset import PartName
from foveal.distributed.engine import Engine
from foveal.loop import Objective
from foveal.runtime import Run


class Measure(Protocol):
    """How well a model does on a part of a split after a step, every sample once; every rank calls it."""

    def __call__(self, engine: Engine, run: Run, step: int, *, split: str, part: PartName) -> dict[str, float]: ...


def _own(_plan: FinetunePlan) -> None:
    """The head is the encoder's own, and its card has it."""


@dataclass(frozen=True)
class Task:
    """A row of the table: the model of a plan, the objective of plan and model on a device, the measure, the head's card."""

    build: Callable[[FinetunePlan], nn.Module]
    objective: Callable[[FinetunePlan, Any, torch.device], Objective]
    measure: Measure
    head: Callable[[FinetunePlan], dict[str, Any] | None] = _own


TASKS: dict[LabelKind, Task] = {
    "class": Task(classifier, classify, accuracy),
    "classes": Task(classifier, classify, precision),
    "mask": Task(segmenter, segment, overlap, segment_head),
    "boxes": Task(detector, detect, average_precision, detect_head),
}
