"""Accelerate behind the engine's verbs, for fine-tuning: one process, or DDP. It is never given the loader."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from foveal.distributed.engine import EngineConfig, Whole, autocast
from foveal.distributed.world import World
from foveal.errors import LaunchError
from foveal.optim import OptimConfig


class Accelerate(Whole):
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
        super().__init__(model, groups, optim, cfg, world)
        self.model = self._accelerator.prepare_model(model)
        self._optimizer = self._accelerator.prepare_optimizer(self._guard)

    @contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts the micros of a step as the loop does"
            with autocast(self.device, self._precision):
                yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            self._accelerator.backward(loss)
