"""What the kind of a sample's label makes of fine-tuning: a model, what it learns, and how well it does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune.plan import FinetunePlan
from finetune.tasks.classify import classify
from finetune.tasks.classify_metrics import accuracy, precision
from finetune.tasks.detect import detect, detect_head
from finetune.tasks.detect_metrics import average_precision
from finetune.tasks.segment import segment, segment_head
from finetune.tasks.segment_metrics import overlap
from foveal.data import LabelKind
from foveal.data.sampling.subset import PartName
from foveal.engines.base import Engine
from foveal.training.loop import Parts
from foveal.training.run import Run


class Measure(Protocol):
    """How well a model does on a part of a split after a step, every sample once; every rank calls it."""

    def __call__(self, engine: Engine, run: Run, step: int, *, split: str, part: PartName) -> dict[str, float]: ...


def _own(_plan: FinetunePlan) -> None:
    """The head is the encoder's own, and its card has it."""


@dataclass(frozen=True)
class Task:
    """A row of the table: what a step of a plan is made of on a device, the measure, and the card of the head."""

    parts: Callable[[FinetunePlan, torch.device], Parts[Any]]
    measure: Measure
    head: Callable[[FinetunePlan], dict[str, Any] | None] = _own


TASKS: dict[LabelKind, Task] = {
    "class": Task(classify, accuracy),
    "classes": Task(classify, precision),
    "mask": Task(segment, overlap, segment_head),
    "boxes": Task(detect, average_precision, detect_head),
}
