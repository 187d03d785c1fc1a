"""Accelerate behind the engine's verbs, for fine-tuning: one process, or DDP. It is never given the loader."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foveal.distributed.engine import EngineConfig, Outcome, Precision, apply_lr, autocast, evaluating
from foveal.distributed.world import World
from foveal.errors import LaunchError
from foveal.optim import GuardedAdamW, OptimConfig


class Accelerate:
    """The adapter. Accelerate divides the loss by the accumulation count; DDP averages gradients over ranks."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulate: int,
    ) -> None:
        # Without cpu=True on a machine without a GPU, each of two launched processes believes that it is alone.
        self._accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no",  # precision is the engine's: Accelerate keeps one for the life of a process
            gradient_accumulation_steps=accumulate,
        )
        if self._accelerator.num_processes != world.size:
            raise LaunchError(
                f"Accelerate counts {self._accelerator.num_processes} processes where the launcher started {world.size}; "
                f"start with --num_processes {world.size} and, on CPUs, --config_file configs/accelerate/cpu2.yaml"
            )
        self._guard = GuardedAdamW(groups, optim)
        self._module = model
        self.model = self._accelerator.prepare_model(model)
        self._optimizer = self._accelerator.prepare_optimizer(self._guard)
        self.device = world.device
        self._world = world
        self._precision: Precision = cfg.precision

    def set_lr(self, lr: float) -> None:
        apply_lr(self._guard, lr)

    @contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts the micros of a step as the loop does"
            with autocast(self.device, self._precision):
                yield

    @contextmanager
    def looking(self) -> Iterator[None]:
        with evaluating(self.model), autocast(self.device, self._precision):
            yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            self._accelerator.backward(loss)

    def step(self) -> Outcome:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Outcome(self._guard.applied, self._guard.norm)

    def save(self, folder: Path) -> None:
        if self._world.rank == 0:
            torch.save(
                {"model": self._module.state_dict(), "optimizer": self._guard.state_dict()}, folder / "accelerate.pt"
            )

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "accelerate.pt", map_location=self.device, weights_only=True)
        self._module.load_state_dict(state["model"])
        self._guard.load_state_dict(state["optimizer"])

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().float().cpu() for name, value in self._module.state_dict().items()}
