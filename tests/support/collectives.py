"""What ranks send each other: every collective of torch's process groups, also those that C++ calls, such as DDP's."""

from dataclasses import dataclass
from typing import Any

import torch
from engines import Shape, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.distributed.world import World

_REDUCTIONS = {"allreduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_", "allreduce_coalesced_"}


@dataclass(frozen=True)
class Collective:
    """One collective: its operator, and the type and number of the elements that this rank puts in."""

    operator: str
    dtype: torch.dtype
    elements: int

    @property
    def is_reduction(self) -> bool:
        """Whether it sums floating-point numbers that may be gradients: sums of metrics are in float64."""
        return self.operator in _REDUCTIONS and self.dtype.is_floating_point and self.dtype != torch.float64


class CollectiveSpy(TorchDispatchMode):
    """Records the collectives of the calling thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            operator = func._schema.name.removeprefix("c10d::")
            # Operators with an output and an input have them in this order; the others work in place.
            tensors = _tensors(args[1] if operator.endswith("_base_") else args[0])
            self.seen += [Collective(operator, tensor.dtype, tensor.numel()) for tensor in tensors]
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value for tensor in _tensors(inner)] if isinstance(value, list | tuple) else []


def collectives_of_a_step(world: World, shape: Shape) -> tuple[list[Collective], set[torch.dtype]]:
    """The collectives of a shape's second step, and the types that DeepSpeed marks parameters with."""
    trainer = Trainer(world, shape)
    trainer.step(0)
    with CollectiveSpy() as spy:
        trainer.step(1)
    marks = {getattr(parameter, "comm_dtype", None) for parameter in trainer.module.parameters()}
    return spy.seen, {mark for mark in marks if mark is not None}
