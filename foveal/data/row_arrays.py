"""The memory of a microbatch that is being read: its tensors, which a reader writes by row."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from foveal.data.batch import BadSample, Batch
from foveal.data.batch_plan import BatchPlan


@dataclass(frozen=True)
class ReadResult:
    """What a reader returns beside the rows that it has written: bad samples, and by row labels of varying shape."""

    bad_samples: tuple[BadSample, ...] = ()
    labels: tuple[tuple[int, np.ndarray], ...] = ()


@dataclass(frozen=True)
class RowLayout:
    """Name, shape and type of the tensors of a microbatch. Labels whose shape varies have no place in them."""

    shapes: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def from_plan(cls, plan: BatchPlan) -> Self:
        """Return the layout of a plan's microbatches."""
        rows = plan.num_rows
        shapes: list[tuple[str, tuple[int, ...], str]] = [
            ("images", (rows, plan.cfg.channels, *plan.output_hw), "uint8"),
            *((name, (rows,), "int64") for name in ("labels", "ids", "sample_keys")),
            ("valid", (rows,), "bool"),
        ]
        if plan.label_reader is not None and plan.label_reader.has_fixed_shape:
            empty = plan.label_reader.empty_label(plan.output_hw)
            shapes.append(("targets", (rows, *empty.shape), empty.dtype.name))
        return cls(tuple(shapes))

    def allocate(self) -> dict[str, Tensor]:
        """Allocate the tensors, pinned if CUDA is available."""
        pin = torch.cuda.is_available()
        return {
            name: torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pin) for name, shape, dtype in self.shapes
        }


def make_batch(plan: BatchPlan, number: int, tensors: dict[str, Tensor], results: list[ReadResult]) -> Batch:
    """Return a microbatch whose rows are written, from its tensors and all that the readers returned."""
    targets, reader = tensors.get("targets"), plan.label_reader
    if reader is not None and targets is None:
        labels: list[np.ndarray | None] = [None] * plan.num_rows
        for result in results:
            for row, label in result.labels:
                labels[row] = label
        targets = reader.collate(labels, plan.output_hw)
    step, epoch, microbatch_index = plan.position(number)
    bad_samples = [bad_sample for result in results for bad_sample in result.bad_samples]
    return Batch(
        images=tensors["images"],
        labels=tensors["labels"],
        ids=tensors["ids"],
        sample_keys=tensors["sample_keys"],
        valid=tensors["valid"],
        step=step,
        epoch=epoch,
        microbatch_index=microbatch_index,
        bad_samples=tuple(sorted(bad_samples, key=lambda bad_sample: bad_sample.row)),
        targets=targets,
    )
