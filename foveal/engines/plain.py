"""The reference engine: one process and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foveal.distributed.world import World
from foveal.engines.base import EngineConfig, Whole, autocast
from foveal.optim.optimizers import OptimConfig, guarded


class Plain(Whole):
    """One process and nothing else: the reference that the other engines must equal."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulate: int,
    ) -> None:
        assert world.size == 1, "check_engine refuses more"
        super().__init__(model.to(world.device), guarded(groups, optim), cfg, world)
        self._accumulate = accumulate

    @contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        with autocast(self.device, self._precision):
            yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            (loss / self._accumulate).backward()
