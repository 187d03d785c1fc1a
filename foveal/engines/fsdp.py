"""FSDP2: torch's fully_shard around each block, and where its shards lie."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from foveal.checkpoint.chunks import TensorChunk
from foveal.distributed.world import World
from foveal.engines.base import to_export_tensor
from foveal.optim.optimizers import GuardedAdamW, GuardedOptimizer, GuardedSGD, OptimConfig, get_moments


class _ShardedOptimizer(GuardedOptimizer):
    """The guard over shards: its norm is that of all ranks together, so that they clip and skip alike."""

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return cast(DTensor, super().total_norm(gradients)).full_tensor()


class _ShardedAdamW(_ShardedOptimizer, GuardedAdamW):
    """AdamW over shards."""


class _ShardedSGD(_ShardedOptimizer, GuardedSGD):
    """SGD over shards."""


def build_sharded_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> GuardedOptimizer:
    """The optimizer of these settings behind the guard, over shards; LARS, which needs whole weights, is refused before."""
    return {"adamw": _ShardedAdamW, "sgd": _ShardedSGD}[cfg.kind](param_groups, cfg)


def apply_fsdp(model: nn.Module, param_groups: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """Shard a model in place, block by block; the same groups, of the parameters that it has now.

    A block is a child of a list of modules of one type. What lies outside of blocks is one unit, gathered for the whole
    of a forward, so that a module may read what its child holds.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in reversed(_find_blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    return [group | {"params": [now[names[id(old)]] for old in group["params"]]} for group in param_groups]


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [
        child
        for each in lists
        if len(each) > 1 and len({type(child) for child in each}) == 1
        for child in each
        if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
    ]


def sharded_parameter_chunks(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[TensorChunk]:
    """The pieces of all parameters: consecutive rows of each."""
    _reshard_modules(module)
    found = []
    for name, parameter in module.named_parameters():
        shards = {"weight": parameter} | (get_moments(optimizer, parameter) if parameter.requires_grad else {})
        parts = {part: cast(DTensor, value.detach()).to_local().view(-1) for part, value in shards.items()}
        whole = cast(DTensor, parameter)
        _, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        row = math.prod(whole.shape[1:])
        found.append(TensorChunk(name, tuple(whole.shape), offset[0] * row, parts, (0, len(parts["weight"]))))
    return found


@torch.no_grad()
def update_ema_sharded(module: nn.Module, pairs: list[tuple[nn.Parameter, nn.Parameter]], lerp_weight: float) -> None:
    """Move this rank's rows of each first parameter towards those of the second, which lie alike."""
    _reshard_modules(module)
    for average, parameter in pairs:
        mine, hers = (cast(DTensor, each.detach()).to_local() for each in (average, parameter))
        mine.lerp_(hers, lerp_weight)


def _reshard_modules(module: nn.Module) -> None:
    """Put away what a forward without a backward has gathered."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def gather_full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All weights, whole, as exports have them; every rank calls it."""
    whole = {}
    for name, value in module.state_dict().items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        whole[name] = to_export_tensor(tensor)
    return whole
