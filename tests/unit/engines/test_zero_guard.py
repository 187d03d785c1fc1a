"""The guard of ZeRO 1 to 3 trains as DeepSpeed's own decision does, and fails where DeepSpeed differs from 0.19.8."""

from typing import Any

import pytest
from engines import OPTIM, Shape, Trainer
from ranks import Ranks

from foveal.distributed.world import World
from foveal.engines.zero_guard import ZeroGuard, is_decided_on_device

Numbers = list[tuple[float, float]]


def train(world: World, zero: int, *, guarded: bool) -> tuple[Numbers, int]:
    """Return loss and gradient norm of clipped steps, and how often the guard decided."""
    with pytest.MonkeyPatch.context() as patch:
        if not guarded:
            patch.setattr("foveal.engines.deepspeed.is_decided_on_device", lambda *_: False)
        trainer: Any = Trainer(world, Shape(1, "deepspeed", zero))
        results = [trainer.step(number) for number in range(4)]
    guard = trainer.engine._guard
    return [(told.loss, told.grad_norm) for told in results], guard._num_observed if guard is not None else 0


def train_guarded_and_not(world: World, zero: int) -> tuple[Numbers, Numbers]:
    """Return the numbers of the same steps under the guard and under DeepSpeed's decision."""
    (guarded, decisions), (own, no_decisions) = train(world, zero, guarded=True), train(world, zero, guarded=False)
    assert (decisions, no_decisions) == (4, 0)
    return guarded, own


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_curve_is_deepspeeds_own(zero: int, one_rank: Ranks) -> None:
    """ZeRO 3 keeps DeepSpeed's norm and clipping; under 1 and 2 both round otherwise."""
    guarded, own = one_rank.call(train_guarded_and_not, zero)[0]
    assert min(norm for _, norm in own) > (OPTIM.max_grad_norm or 0), "otherwise nothing is clipped"
    if zero == 3:
        assert guarded == own
    for row, expected in zip(guarded, own, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


class Zero3Optimizer:
    """ZeRO 3's optimizer of a DeepSpeed that does not ask whether the norm is finite."""

    def step(self) -> None:
        """Update."""


def take_unasked_step(world: World) -> None:
    """Take a step of a DeepSpeed that would update with NaN."""
    zero_optimizer: Any = Zero3Optimizer()
    ZeroGuard(zero_optimizer, Any, 3, None, world)  # pyright: ignore[reportArgumentType]
    zero_optimizer.step()


def test_a_deepspeed_that_does_not_ask_is_refused(one_rank: Ranks) -> None:
    with pytest.raises(AssertionError, match="asks once per step whether the norm is finite"):
        one_rank.call(take_unasked_step)


@pytest.mark.parametrize(
    ("zero", "fused", "options", "expected"),
    [
        (0, True, {}, False),
        (1, True, {}, True),
        (3, True, {"offload_optimizer": {"device": "none"}}, True),
        (2, False, {}, False),
        (1, True, {"offload_optimizer": {"device": "cpu"}}, False),
        (3, True, {"offload_param": {"device": "cpu"}}, False),
    ],
)
def test_deepspeed_decides_where_it_offloads_or_nothing_is_fused(
    zero: int, fused: bool, options: dict[str, Any], expected: bool
) -> None:
    assert is_decided_on_device(OPTIM.model_copy(update={"fused": fused}), zero, options) is expected
