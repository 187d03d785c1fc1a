"""Guarded SGD and LARS: equal to torch and the paper, with zero initial moments, unchanged by skipped steps."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import get_or_create_moments
from foveal.optim.optimizers import (
    build_optimizer,
    count_moment_elements,
    get_num_updates,
    parameter_groups,
    set_num_updates,
)

KINDS = ("sgd", "lars")


def config(kind: str, **settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"name": kind, "lr_per_256": 0.1, "weight_decay": 0.2, **settings})


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def optimizer(model: nn.Module, cfg: OptimConfig) -> GuardedOptimizer:
    return build_optimizer(parameter_groups(model, cfg), cfg)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copy_state(model: nn.Module, guard: GuardedOptimizer) -> list[Tensor]:
    """Copies of the weights and moments."""
    states = [value for parameter in model.parameters() for value in get_or_create_moments(guard, parameter).values()]
    return [copy.deepcopy(value.detach()) for value in (*model.parameters(), *states)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_sgd_is_torchs_bit_for_bit(momentum: float, clip: float | None) -> None:
    model, torch_model = layer(), layer()
    guard = optimizer(model, config("sgd", momentum=momentum, max_grad_norm=clip))
    groups = [{"params": [torch_model.weight], "weight_decay": 0.2}, {"params": [torch_model.bias]}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    for step in range(4):
        set_gradients(model, step)
        set_gradients(torch_model, step)
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), clip or float("inf"))
        guard.step()
        sgd.step()
        assert guard.step_applied
        assert guard.grad_norm == float(norm) > 0.5
        assert model.weight.equal(torch_model.weight)
        assert model.bias.equal(torch_model.bias)
    assert get_num_updates(guard) == 4


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lars_is_the_papers_for_matrices_and_sgd_for_vectors(decay: float) -> None:
    """Compared with NumPy; without decay, as in linear probing, a matrix is still scaled by its ratio."""
    model = layer()
    guard = optimizer(model, config("lars", weight_decay=decay))
    weight, bias = (value.detach().double().numpy().copy() for value in (model.weight, model.bias))
    buffer, bias_buffer = np.zeros_like(weight), np.zeros_like(bias)
    for step in range(4):
        set_gradients(model, step)
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        gradient, bias_gradient = (value.double().numpy() for value in (model.weight.grad, model.bias.grad))
        norm = np.sqrt((weight**2).sum())
        ratio = 0.001 * norm / (np.sqrt((gradient**2).sum()) + decay * norm)
        buffer = 0.9 * buffer + ratio * (gradient + decay * weight)
        bias_buffer = 0.9 * bias_buffer + bias_gradient
        weight, bias = weight - 0.1 * buffer, bias - 0.1 * bias_buffer
        guard.step()
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-6)
        np.testing.assert_allclose(model.bias.detach().numpy(), bias, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_the_first_update_change_nothing(kind: str) -> None:
    """A checkpoint of step 0, with which every run begins, holds zero moments."""
    inspected, reference = layer(), layer()
    inspected_guard, reference_guard = optimizer(inspected, config(kind)), optimizer(reference, config(kind))
    names = {name for parameter in inspected.parameters() for name in get_or_create_moments(inspected_guard, parameter)}
    assert names == {"momentum_buffer"}
    for step in range(3):
        for model, guard in ((inspected, inspected_guard), (reference, reference_guard)):
            set_gradients(model, step)
            guard.step()
    assert all(
        a.equal(b)
        for a, b in zip(copy_state(inspected, inspected_guard), copy_state(reference, reference_guard), strict=True)
    )


def test_without_momentum_nothing_is_kept() -> None:
    model = layer()
    guard = optimizer(model, config("sgd", momentum=0.0))
    assert get_or_create_moments(guard, model.weight) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    model, reference = layer(), layer()
    guard, untouched = (
        optimizer(model, config(kind, max_grad_norm=1.0)),
        optimizer(reference, config(kind, max_grad_norm=1.0)),
    )
    for step in range(3):
        before = copy_state(model, guard)
        set_gradients(model, 100 + step)
        assert model.weight.grad is not None
        model.weight.grad[0, 0] = bad
        guard.step()
        assert not guard.step_applied
        assert all(a.equal(b) for a, b in zip(before, copy_state(model, guard), strict=True))
        for updated, updated_guard in ((model, guard), (reference, untouched)):
            set_gradients(updated, step)
            updated_guard.step()
        assert all(a.equal(b) for a, b in zip(copy_state(model, guard), copy_state(reference, untouched), strict=True))
    assert get_num_updates(guard) == 3


@pytest.mark.parametrize("kind", ["adamw", *KINDS])
def test_updates_are_counted_from_where_a_checkpoint_says(kind: str) -> None:
    model = layer()
    guard = optimizer(model, config(kind))
    copy_state(model, guard)
    set_num_updates(guard, 7)
    set_gradients(model, 0)
    guard.step()
    assert get_num_updates(guard) == 8
    if kind == "adamw":
        assert {int(state["step"]) for state in guard.state.values()} == {8}


def test_plans_count_what_optimizers_keep() -> None:
    for cfg in (config("adamw"), config("sgd"), config("lars"), config("sgd", momentum=0.0)):
        model = layer()
        assert len(get_or_create_moments(optimizer(model, cfg), model.weight)) == count_moment_elements(cfg, 1, 0)
