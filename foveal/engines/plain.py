"""The reference engine: one process and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foveal.distributed.world import World
from foveal.engines.base import EngineConfig, ReplicatedEngine, autocast
from foveal.optim.optimizers import OptimConfig, build_optimizer


class PlainEngine(ReplicatedEngine):
    """One process and nothing else: the reference that the other engines must equal."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulation_steps: int,
    ) -> None:
        assert world.size == 1, "check_engine refuses more"
        super().__init__(model.to(world.device), build_optimizer(param_groups, optim), cfg, world)
        self._accumulate = accumulation_steps

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with autocast(self.device, self._precision):
            yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            (loss / self._accumulate).backward()
