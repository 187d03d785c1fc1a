"""The plain engine: one process, without a library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveal.engines.base import ReplicatedEngine, autocast
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import GuardedOptimizer, build_optimizer


class PlainEngine(ReplicatedEngine):
    """The reference engine: one process, without a library; all other engines must equal it."""

    def _prepare(
        self, model: nn.Module, param_groups: list[dict[str, Any]], optim: OptimConfig
    ) -> tuple[nn.Module, GuardedOptimizer, torch.optim.Optimizer]:
        assert self._world.size == 1, "check_engine_config refuses more ranks"
        model.to(self.device)
        guard = build_optimizer(param_groups, optim)
        return model, guard, guard

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with autocast(self.device, self._precision):
            yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            (loss / self._accumulation_steps).backward()
