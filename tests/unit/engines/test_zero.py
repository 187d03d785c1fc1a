"""ZeRO 1 and 2 with fewer operations: the same bits as with DeepSpeed's own options and views."""

from typing import Any

import pytest
import torch
from engines import Shape, Trainer
from ranks import Ranks
from torch import Tensor

from foveal.distributed.world import World

Numbers = list[tuple[float, float]]


def train(world: World, shape: Shape, *, renews_views: bool = False) -> tuple[Numbers, dict[str, Tensor]]:
    """Return loss and gradient norm of four steps, and the weights after them."""
    with pytest.MonkeyPatch.context() as patch:
        if renews_views:
            patch.setattr("foveal.engines.deepspeed.keep_weights_as_views", lambda _: None)
        trainer: Any = Trainer(world, shape)
    told = [trainer.step(number) for number in range(4)]
    flat_tensors = {flat.untyped_storage().data_ptr() for flat in trainer.engine._optimizer.bit16_groups_flat}
    for name, parameter in trainer.module.named_parameters():
        assert not parameter.requires_grad or parameter.untyped_storage().data_ptr() in flat_tensors, name
    weights = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    return [(step.loss, step.grad_norm) for step in told], weights


def train_all(world: World, zero: int, precision: str) -> list[tuple[Numbers, dict[str, Tensor]]]:
    """Train with gradients reduced in buckets, in place, and in place with views that are renewed in every step."""

    def shape(contiguous: bool) -> Shape:
        options = {"overlap_comm": False, "contiguous_gradients": contiguous, "reduce_bucket_size": 100}
        return Shape(world.size, "deepspeed", zero, precision=precision, deepspeed={"zero_optimization": options})

    return [train(world, shape(True)), train(world, shape(False)), train(world, shape(False), renews_views=True)]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("zero", [1, 2])
def test_gradients_reduced_in_place_and_views_that_stay_change_no_bit(
    zero: int, precision: str, two_ranks: Ranks
) -> None:
    for (numbers, weights), *others in two_ranks.call(train_all, zero, precision):
        for other_numbers, other_weights in others:
            assert other_numbers == numbers
            assert [name for name, value in weights.items() if not torch.equal(value, other_weights[name])] == []
