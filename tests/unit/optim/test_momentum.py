"""SGD and LARS behind the guard: torch's and the paper's steps, zeros to begin with, and steps that leave all as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveal.optim.optimizers import (
    GuardedOptimizer,
    OptimConfig,
    build_optimizer,
    get_moments,
    get_num_updates,
    parameter_groups,
    set_num_updates,
)

KINDS = ("sgd", "lars")


def config(kind: str, **further: object) -> OptimConfig:
    return OptimConfig.model_validate({"kind": kind, "lr_per_256": 0.1, "weight_decay": 0.2, **further})


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def optimizer(model: nn.Module, cfg: OptimConfig) -> GuardedOptimizer:
    return build_optimizer(parameter_groups(model, cfg), cfg)


def give(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def held(model: nn.Module, guard: GuardedOptimizer) -> list[Tensor]:
    """Weights and moments, as they are now."""
    states = [value for parameter in model.parameters() for value in get_moments(guard, parameter).values()]
    return [copy.deepcopy(value.detach()) for value in (*model.parameters(), *states)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_sgd_is_torchs_bit_for_bit(momentum: float, clip: float | None) -> None:
    ours, theirs = layer(), layer()
    guard = optimizer(ours, config("sgd", momentum=momentum, clip=clip))
    groups = [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias]}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    for step in range(4):
        give(ours, step)
        give(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        guard.step()
        sgd.step()
        assert guard.step_applied
        assert guard.grad_norm == float(norm) > 0.5
        assert ours.weight.equal(theirs.weight)
        assert ours.bias.equal(theirs.bias)
    assert get_num_updates(guard) == 4


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lars_is_the_papers_for_matrices_and_sgd_for_vectors(decay: float) -> None:
    """Written out in NumPy; without decay, as in linear probing, a matrix has its ratio all the same."""
    model = layer()
    guard = optimizer(model, config("lars", weight_decay=decay))
    weight, bias = (value.detach().double().numpy().copy() for value in (model.weight, model.bias))
    speed, bias_speed = np.zeros_like(weight), np.zeros_like(bias)
    for step in range(4):
        give(model, step)
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        gradient, bias_gradient = (value.double().numpy() for value in (model.weight.grad, model.bias.grad))
        norm = np.sqrt((weight**2).sum())
        ratio = 0.001 * norm / (np.sqrt((gradient**2).sum()) + decay * norm)
        speed = 0.9 * speed + ratio * (gradient + decay * weight)
        bias_speed = 0.9 * bias_speed + bias_gradient
        weight, bias = weight - 0.1 * speed, bias - 0.1 * bias_speed
        guard.step()
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-6)
        np.testing.assert_allclose(model.bias.detach().numpy(), bias, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_the_first_update_change_nothing(kind: str) -> None:
    """A checkpoint of step 0 holds them, and every run begins with one."""
    looked_at, never = layer(), layer()
    one, other = optimizer(looked_at, config(kind)), optimizer(never, config(kind))
    assert {name for parameter in looked_at.parameters() for name in get_moments(one, parameter)} == {"momentum_buffer"}
    for step in range(3):
        for model, guard in ((looked_at, one), (never, other)):
            give(model, step)
            guard.step()
    assert all(a.equal(b) for a, b in zip(held(looked_at, one), held(never, other), strict=True))


def test_without_momentum_nothing_is_kept() -> None:
    model = layer()
    guard = optimizer(model, config("sgd", momentum=0.0))
    assert get_moments(guard, model.weight) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    model, never = layer(), layer()
    guard, untouched = optimizer(model, config(kind, clip=1.0)), optimizer(never, config(kind, clip=1.0))
    for step in range(3):
        before = held(model, guard)
        give(model, 100 + step)
        assert model.weight.grad is not None
        model.weight.grad[0, 0] = bad
        guard.step()
        assert not guard.step_applied
        assert all(a.equal(b) for a, b in zip(before, held(model, guard), strict=True))
        for each, other in ((model, guard), (never, untouched)):
            give(each, step)
            other.step()
        assert all(a.equal(b) for a, b in zip(held(model, guard), held(never, untouched), strict=True))
    assert get_num_updates(guard) == 3


@pytest.mark.parametrize("kind", ["adamw", *KINDS])
def test_updates_are_counted_from_where_a_checkpoint_says(kind: str) -> None:
    model = layer()
    guard = optimizer(model, config(kind))
    held(model, guard)
    set_num_updates(guard, 7)
    give(model, 0)
    guard.step()
    assert get_num_updates(guard) == 8
    if kind == "adamw":
        assert {int(state["step"]) for state in guard.state.values()} == {8}


def test_plans_count_what_optimizers_keep() -> None:
    for cfg in (config("adamw"), config("sgd"), config("lars"), config("sgd", momentum=0.0)):
        model = layer()
        assert len(get_moments(optimizer(model, cfg), model.weight)) == cfg.moments_per_parameter
