"""The plain engine: one process, without a library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveal.engines.base import ReplicatedEngine, autocast
from foveal.engines.linear_casts import make_linear_casts
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.optimizers import build_optimizer


class PlainEngine(ReplicatedEngine):
    """The reference engine: one process, without a library; all other engines must equal it."""

    def _prepare(
        self, model: nn.Module, param_groups: list[dict[str, Any]], optim: OptimConfig
    ) -> tuple[nn.Module, GuardedOptimizer, torch.optim.Optimizer]:
        assert self._world.size == 1, "check_engine_config refuses more ranks"
        model.to(self.device)
        guard = build_optimizer(param_groups, optim)
        self._linear_casts = make_linear_casts(model, self._cfg)
        return model, guard, guard

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with autocast(self.device, self._precision), self._linear_casts():
            yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            (loss / self._accumulation_steps).backward()
