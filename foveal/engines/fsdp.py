"""FSDP2: apply torch's fully_shard to each block, and find each rank's shards."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm

from foveal.checkpoint.chunks import TensorChunk
from foveal.distributed.world import World
from foveal.engines.base import lerp_all_, to_fp32_cpu_tensor
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import get_or_create_moments
from foveal.optim.optimizers import build_optimizer


def build_sharded_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> GuardedOptimizer:
    """Build the guarded optimizer for shards; its gradient norm is global, so that all ranks clip and skip alike."""
    guard = build_optimizer(param_groups, cfg)
    guard.total_norm = _global_norm
    return guard


def _global_norm(gradients: list[Tensor]) -> Tensor:
    return cast(DTensor, get_total_norm(gradients)).full_tensor()


def apply_fsdp(model: nn.Module, param_groups: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """Shard a model in place, block by block; return the parameter groups with the sharded parameters.

    A block is a child of a module list of one type. All other parameters form one unit that is gathered for the entire
    forward, so that a module may read its child's parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # One dimension: over several nodes a second one would keep gathers inside a node, and nobody has measured it.
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in reversed(_find_blocks(model)):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sharded = dict(model.named_parameters())
    return [group | {"params": [sharded[names[id(old)]] for old in group["params"]]} for group in param_groups]


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [
        child
        for modules in lists
        if len(modules) > 1 and len({type(child) for child in modules}) == 1
        for child in modules
        if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
    ]


def sharded_parameter_chunks(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[TensorChunk]:
    """Return the chunks of all parameters: consecutive rows of each."""
    _reshard_modules(module)
    chunks = []
    for name, parameter in module.named_parameters():
        shards = {"weight": parameter} | (
            get_or_create_moments(optimizer, parameter) if parameter.requires_grad else {}
        )
        tensors = {part: cast(DTensor, value.detach()).to_local().view(-1) for part, value in shards.items()}
        dtensor = cast(DTensor, parameter)
        _, offset = compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)
        row_size = math.prod(dtensor.shape[1:])
        start = offset[0] * row_size
        chunks.append(TensorChunk(name, tuple(dtensor.shape), start, tensors, (0, len(tensors["weight"]))))
    return chunks


@torch.no_grad()
def update_ema_sharded(module: nn.Module, pairs: list[tuple[nn.Parameter, nn.Parameter]], lerp_weight: Tensor) -> None:
    """Interpolate this rank's rows of each EMA parameter to its source, which is sharded alike."""
    _reshard_modules(module)
    lerp_all_([(_local_rows(average), _local_rows(source)) for average, source in pairs], lerp_weight)


def _local_rows(parameter: nn.Parameter) -> Tensor:
    return cast(DTensor, parameter.detach()).to_local()


def _reshard_modules(module: nn.Module) -> None:
    """Free the parameters that a forward without a backward has gathered."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def gather_full_state_dict(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return all unsharded weights in the form of exports on rank 0, none on the others; every rank calls it."""
    weights = {}
    for name, value in module.state_dict().items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            weights[name] = to_fp32_cpu_tensor(tensor)
    return weights
