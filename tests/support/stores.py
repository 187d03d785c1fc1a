"""An engine of two small tensors, and stores of it: what tests of the checkpoint store share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.checkpoint.chunks import TensorChunk
from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.protocols import Communicator
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
SCIENCE = {"seed": 3, "optim.betas": [0.9, 0.95]}
SHAPES = {"embed": (7, 3), "head.bias": (5,)}
PARTS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass
class Tensors:
    """Every element of everything is ``value``; each rank holds its share of each tensor."""

    value: float
    rank: int = 0
    ranks: int = 1
    num_updates: int = 0
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            first, last = self._share(shape)
            self.held[name] = {part: torch.full((last - first,), float(self.value)) for part in PARTS}

    def _share(self, shape: tuple[int, ...]) -> tuple[int, int]:
        size = torch.Size(shape).numel()
        return size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks

    def state_chunks(self) -> list[TensorChunk]:
        return [
            TensorChunk(name, shape, self._share(shape)[0], self.held[name], (0, len(self.held[name]["weight"])))
            for name, shape in SHAPES.items()
        ]

    def on_state_loaded(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def fill(self, value: float) -> None:
        """A step of training."""
        for parts in self.held.values():
            for each in parts.values():
                each.fill_(value)

    def values(self) -> set[float]:
        """All that occur."""
        return {float(each) for parts in self.held.values() for part in parts.values() for each in part}


def state(step: int) -> TrainState:
    return TrainState(step, step * 1.5, 1, "plain, fp32", SCIENCE, {"torch": "2"}, updates=step)


def store(
    root: Path, attempt: int = 1, starts: Mapping[int, int] | None = None, world: Communicator = ALONE, **settings: Any
) -> CheckpointStore:
    """A store that keeps everything, unless the settings say otherwise."""
    return CheckpointStore(root, CheckpointConfig.model_validate({"keep": 99} | settings), world, attempt, starts or {})


def saved(made: CheckpointStore, step: int, **settings: Any) -> None:
    """Save a step whose every element is its number, and wait for it."""
    saver = CheckpointSaver(made, **settings)
    saver.save(Tensors(step, num_updates=step), state(step))
    saver.wait_and_commit()


def name(step: int, attempt: int = 1) -> str:
    return f"step-{step:08d}-attempt-{attempt:04d}"


def names(root: Path) -> list[str]:
    return sorted(each.name for each in root.iterdir())
