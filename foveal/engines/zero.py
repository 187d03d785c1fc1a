"""Where DeepSpeed's ZeRO optimizers keep what a rank holds, and how the working weights follow their masters.

DeepSpeed 0.19.8's own attributes: its checkpoints can be loaded by as many ranks as wrote them, foveal's by any.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk, replicated_chunk
from foveal.distributed.world import World
from foveal.optim.optimizers import get_moments


def sharded_parameter_chunks(module: nn.Module, optimizer: Any, zero_stage: int, world: World) -> list[TensorChunk]:
    """The pieces of all parameters under ZeRO 1, 2 (masters) and 3."""
    piece = _zero3_chunk if zero_stage == 3 else _zero12_chunk
    return [piece(name, value, optimizer, world) for name, value in module.named_parameters()]


def _zero12_chunk(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> TensorChunk:
    """A run that ends where the rank's flat partition of the group does, which may be anywhere, or nothing."""
    if not parameter.requires_grad:
        return replicated_chunk(name, {"weight": parameter}, world.rank, world.size)
    held: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed puts it there
    shape = tuple(parameter.shape)
    if held is None:
        flat = optimizer.single_partition_of_fp32_groups[0]
        return _partition_chunk(name, shape, 0, flat, optimizer, 0, 0)
    flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
    place = held.hp_fragment_address
    return _partition_chunk(name, shape, held.lp_fragment_address.start, flat, optimizer, place.start, place.numel)


def _zero3_chunk(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> TensorChunk:
    """An equal share of every parameter; the last ones are padded."""
    sharded: Any = parameter
    share, shape = sharded.partition_numel(), tuple(sharded.ds_shape)
    start = min(share * world.rank, sharded.ds_numel)
    size = min(share, sharded.ds_numel - start)
    if not parameter.requires_grad:
        return TensorChunk(name, shape, start, {"weight": sharded.ds_tensor.detach().view(-1)[:size]}, (0, size))
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return _partition_chunk(name, shape, start, optimizer.fp32_partitioned_groups_flat[group], optimizer, offset, size)


def _partition_chunk(
    name: str, shape: tuple[int, ...], start: int, flat: Tensor, optimizer: Any, offset: int, size: int
) -> TensorChunk:
    parts = {"weight": flat} | get_moments(optimizer.optimizer, flat)
    return TensorChunk(name, shape, start, {k: v.detach().narrow(0, offset, size) for k, v in parts.items()}, (0, size))


@torch.no_grad()
def update_ema_sharded(optimizer: Any, pairs: list[tuple[nn.Parameter, nn.Parameter]], lerp_weight: float) -> None:
    """Move this rank's share of each first parameter towards that of the second, under ZeRO 3, on all ranks.

    Two parameters of one shape are shared out alike.
    """
    optimizer.checkpoint_event_prologue()  # puts away what is gathered, which is of the old weights
    for average, parameter in pairs:
        cast(Any, average).ds_tensor.lerp_(cast(Any, parameter).ds_tensor, lerp_weight)
    optimizer.checkpoint_event_epilogue()  # gathers what stays gathered


@torch.no_grad()
def copy_master_weights_to_model(optimizer: Any, zero_stage: int) -> None:
    """Give the masters' values to the working weights, on all ranks."""
    if zero_stage < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # puts away what is gathered, which is of the old weights
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
    optimizer.checkpoint_event_epilogue()  # gathers what stays gathered
