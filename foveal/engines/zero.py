"""Chunks of DeepSpeed's ZeRO partitions, and copies of fp32 master weights to the model.

Uses internal attributes of DeepSpeed 0.19.8, because DeepSpeed's checkpoints load only on the number of ranks that
wrote them, foveal's on any.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk, replicated_chunk
from foveal.distributed.world import World
from foveal.engines.base import lerp_all_
from foveal.optim.moments import get_or_create_moments


def sharded_parameter_chunks(module: nn.Module, optimizer: Any, zero_stage: int, world: World) -> list[TensorChunk]:
    """Return the chunks of all parameters under ZeRO 1 to 3; the weights are the fp32 masters."""
    make_chunk = _zero3_chunk if zero_stage == 3 else _zero12_chunk
    return [make_chunk(name, value, optimizer, world) for name, value in module.named_parameters()]


def _zero12_chunk(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> TensorChunk:
    """Return the part of a parameter in the rank's flat partition of its group: any range, or an empty one."""
    if not parameter.requires_grad:
        return replicated_chunk(name, {"weight": parameter}, world.rank, world.size)
    mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - an attribute that DeepSpeed sets
    shape = tuple(parameter.shape)
    if mapping is None:
        flat = optimizer.single_partition_of_fp32_groups[0]
        return _partition_chunk(name, shape, 0, flat, optimizer, 0, 0)
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    start = mapping.lp_fragment_address.start
    fragment = mapping.hp_fragment_address
    return _partition_chunk(name, shape, start, flat, optimizer, fragment.start, fragment.numel)


def _zero3_chunk(name: str, parameter: nn.Parameter, optimizer: Any, world: World) -> TensorChunk:
    """Return the rank's partition of a parameter; all partitions are equally long, the last ones padded."""
    sharded: Any = parameter
    partition_size = sharded.partition_numel()
    shape = tuple(sharded.ds_shape)
    start = min(partition_size * world.rank, sharded.ds_numel)
    size = min(partition_size, sharded.ds_numel - start)
    if not parameter.requires_grad:
        return TensorChunk(name, shape, start, {"weight": sharded.ds_tensor.detach().view(-1)[:size]}, (0, size))
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return _partition_chunk(name, shape, start, optimizer.fp32_partitioned_groups_flat[group], optimizer, offset, size)


def _partition_chunk(
    name: str, shape: tuple[int, ...], start: int, flat: Tensor, optimizer: Any, offset: int, size: int
) -> TensorChunk:
    partitions = {"weight": flat} | get_or_create_moments(optimizer.optimizer, flat)
    tensors = {part: value.detach().narrow(0, offset, size) for part, value in partitions.items()}
    return TensorChunk(name, shape, start, tensors, (0, size))


def keep_weights_as_views(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 leave the model's weights as they are after a step: views of the flat tensors that it updates.

    DeepSpeed makes the views anew in every step, five operations of the host per parameter ("we probably don't need
    this", says its source).
    """
    optimizer._update_model_bit16_weights = _make_no_views  # noqa: SLF001


def _make_no_views(_group: int) -> None:
    """Take the place of DeepSpeed's method."""


@torch.no_grad()
def update_ema_sharded(optimizer: Any, pairs: list[tuple[nn.Parameter, nn.Parameter]], lerp_weight: Tensor) -> None:
    """Interpolate this rank's partition of each EMA parameter to its source, under ZeRO 3; every rank calls it.

    Parameters of equal shape have equal partitions.
    """
    optimizer.checkpoint_event_prologue()  # frees gathered parameters, which hold the old weights
    lerp_all_([(cast(Any, average).ds_tensor, cast(Any, source).ds_tensor) for average, source in pairs], lerp_weight)
    optimizer.checkpoint_event_epilogue()  # gathers persistent parameters again


@torch.no_grad()
def copy_master_weights_to_model(optimizer: Any, zero_stage: int) -> None:
    """Copy the fp32 master weights to the model's weights; every rank calls it."""
    if zero_stage < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # frees gathered parameters, which hold the old weights
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
    optimizer.checkpoint_event_epilogue()  # gathers persistent parameters again
