"""Where DeepSpeed's ZeRO optimizers keep what a rank holds, and how the working weights follow their masters.

DeepSpeed 0.19.8's own attributes: its checkpoints can be loaded by as many ranks as wrote them, foveal's by any.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import Piece, whole
from foveal.distributed.world import World
from foveal.optim.optimizers import moments


def sharded_parameters(module: nn.Module, optimizer: Any, stage: int, world: World) -> list[Piece]:
    """The pieces of all parameters under ZeRO 1, 2 (masters) and 3."""
    piece = _of_stage_3 if stage == 3 else _of_stages_1_and_2
    return [piece(name, value, optimizer, world) for name, value in module.named_parameters()]


def _of_stages_1_and_2(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> Piece:
    """A run that ends where the rank's flat partition of the group does, which may be anywhere, or nothing."""
    if not parameter.requires_grad:
        return whole(name, {"weight": parameter}, world.rank, world.size)
    held: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed puts it there
    shape = tuple(parameter.shape)
    if held is None:
        flat = optimizer.single_partition_of_fp32_groups[0]
        return _run(name, shape, 0, flat, optimizer, 0, 0)
    flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
    place = held.hp_fragment_address
    return _run(name, shape, held.lp_fragment_address.start, flat, optimizer, place.start, place.numel)


def _of_stage_3(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> Piece:
    """An equal share of every parameter; the last ones are padded."""
    sharded: Any = parameter
    share, shape = sharded.partition_numel(), tuple(sharded.ds_shape)
    start = min(share * world.rank, sharded.ds_numel)
    size = min(share, sharded.ds_numel - start)
    if not parameter.requires_grad:
        return Piece(name, shape, start, {"weight": sharded.ds_tensor.detach().view(-1)[:size]}, (0, size))
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return _run(name, shape, start, optimizer.fp32_partitioned_groups_flat[group], optimizer, offset, size)


def _run(name: str, shape: tuple[int, ...], start: int, flat: Tensor, optimizer: Any, offset: int, size: int) -> Piece:
    parts = {"weight": flat} | moments(optimizer.optimizer, flat)
    return Piece(name, shape, start, {k: v.detach().narrow(0, offset, size) for k, v in parts.items()}, (0, size))


@torch.no_grad()
def average_shards(optimizer: Any, pairs: list[tuple[nn.Parameter, nn.Parameter]], weight: float) -> None:
    """Move this rank's share of each first parameter towards that of the second, under ZeRO 3, on all ranks.

    Two parameters of one shape are shared out alike.
    """
    optimizer.checkpoint_event_prologue()  # puts away what is gathered, which is of the old weights
    for average, parameter in pairs:
        cast(Any, average).ds_tensor.lerp_(cast(Any, parameter).ds_tensor, weight)
    optimizer.checkpoint_event_epilogue()  # gathers what stays gathered


@torch.no_grad()
def refresh(optimizer: Any, stage: int) -> None:
    """Give the masters' values to the working weights, on all ranks."""
    if stage < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # puts away what is gathered, which is of the old weights
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
    optimizer.checkpoint_event_epilogue()  # gathers what stays gathered
