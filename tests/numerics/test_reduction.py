"""Gradients are summed over ranks in fp32, and while the backward pass still computes others."""

from typing import Any

import pytest
import torch
from collectives import CollectiveSpy, collectives_of_a_step
from engines import Shape, Tiny
from ranks import Ranks

from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups

_TRAINED = sum(parameter.numel() for parameter in Tiny().parameters() if parameter.requires_grad)
_LINEAR = sum(parameter.numel() for name, parameter in Tiny().named_parameters() if "wide" in name or "narrow" in name)
ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero {zero}": {"kind": "deepspeed", "zero": zero} for zero in range(4)},
    **{f"accelerated zero {zero}": {"kind": "accelerate", "sharding": "deepspeed", "zero": zero} for zero in (1, 2, 3)},
    "ddp": {"kind": "accelerate"},
    "fsdp2": {"kind": "accelerate", "sharding": "fsdp2"},
}


def elements_by_type(ranks: Ranks, **settings: Any) -> tuple[dict[torch.dtype, int], set[torch.dtype]]:
    """The elements of gradients that rank 0 sums in a step, by type, and the types that parameters are marked with."""
    seen, marked = ranks.call(collectives_of_a_step, Shape(2, precision="bf16", **settings))[0]
    reduced: dict[torch.dtype, int] = {}
    for each in seen:
        if each.is_reduction:
            reduced[each.dtype] = reduced.get(each.dtype, 0) + each.elements
    return reduced, marked


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_products_are_summed_in_fp32(engine: str, two_ranks: Ranks) -> None:
    reduced, marked = elements_by_type(two_ranks, **ENGINES[engine])
    assert not marked
    assert reduced.keys() == {torch.float32}
    assert reduced[torch.float32] >= _TRAINED


@pytest.mark.parametrize("engine", ["zero 1", "zero 2", "zero 3"])
def test_a_run_of_0_1_keeps_its_types(engine: str, two_ranks: Ranks) -> None:
    settings = EngineConfig(precision="bf16").keep_neutral_values({}, "engine.")
    assert settings.reduce_dtype == "autocast"
    reduced, marked = elements_by_type(two_ranks, reduce_dtype=settings.reduce_dtype, **ENGINES[engine])
    assert marked == {torch.bfloat16}
    assert reduced[torch.bfloat16] >= _LINEAR


@pytest.mark.parametrize("engine", ["zero 0", "ddp", "fsdp2"])
def test_elsewhere_the_type_of_0_1_was_fp32(engine: str, two_ranks: Ranks) -> None:
    assert elements_by_type(two_ranks, reduce_dtype="autocast", **ENGINES[engine])[0].keys() == {torch.float32}


def reductions_before_the_last_gradient(world: World, engine: dict[str, Any]) -> int:
    """In the second step of three layers of a million weights each, whose first layer's gradient is the last."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(3)]
    model, first, optim = torch.nn.Sequential(*layers), layers[0].weight, OptimConfig()
    groups = parameter_groups(model, optim, lambda _: 0, 0)
    built = build_engine(
        model, groups, optim, EngineConfig.model_validate(engine), world, microbatch_size=2, accumulation_steps=1
    )
    before = -1
    spy = CollectiveSpy()

    def count(_gradient: Any) -> None:
        nonlocal before
        before = sum(each.is_reduction for each in spy.seen)

    for step in range(2):
        with built.microbatch(last=True):
            loss = built.model(torch.ones(2, 1024, device=world.device)).mean()
            if step == 1:
                first.register_hook(count)
                with spy:
                    built.backward(loss)
            else:
                built.backward(loss)
        built.step()
    assert sum(each.is_reduction for each in spy.seen) > before >= 0
    return before


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_reduction_happens_before_the_last_gradient(zero: int, two_ranks: Ranks) -> None:
    assert two_ranks.call(reductions_before_the_last_gradient, {"zero": zero}) == [1, 1]


def test_a_users_keys_rule(two_ranks: Ranks) -> None:
    keys = {"zero_optimization": {"overlap_comm": False}}
    assert two_ranks.call(reductions_before_the_last_gradient, {"zero": 1, "deepspeed": keys}) == [0, 0]
