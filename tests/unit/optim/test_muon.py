"""Muon for hidden matrices and AdamW for the rest: which are which, equal to the paper and to torch, one guard."""

import copy
import logging

import numpy as np
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import get_or_create_moments
from foveal.optim.optimizers import (
    build_optimizer,
    get_num_updates,
    is_hidden_matrix,
    parameter_groups,
)


def config(**settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"name": "muon", "lr_per_256": 0.1, "weight_decay": 0.2, **settings})


class Layers(nn.Module):
    """A hidden matrix, wider or taller than long, a vector and a head."""

    def __init__(self, rows: int = 6, columns: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(columns, rows)
        self.head = nn.Linear(rows, 2)


def optimizer(model: nn.Module, cfg: OptimConfig) -> GuardedOptimizer:
    return build_optimizer(parameter_groups(model, cfg), cfg)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copy_state(model: nn.Module, guard: GuardedOptimizer) -> list[Tensor]:
    """Copies of the weights and of everything that the optimizer keeps, AdamW's counters too."""
    for parameter in model.parameters():
        get_or_create_moments(guard, parameter)
    states = [value for parameter in model.parameters() for _, value in sorted(guard.state[parameter].items())]
    return [copy.deepcopy(value.detach()) for value in (*model.parameters(), *states)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(here.equal(there) for here, there in zip(one, other, strict=True))


def test_matrices_of_blocks_are_muons() -> None:
    vit = VitConfig(name="vit_tiny_patch16_224", patch=4, width=8, depth=2, heads=2, positions="learned", registers=1)
    encoder = build_encoder(vit, image_size=8, channels=1)
    model = MaskedAutoencoder(encoder, DecoderConfig(width=8, depth=1, heads=2), predict_image=True, with_ema=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config())
    of_muon = {names[id(value)] for group in groups if group["hidden_matrices"] for value in group["params"]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = ("encoder.blocks.0", "encoder.blocks.1", "decoder.blocks.0")
    assert of_muon == {f"{block}.{layer}.weight" for block in blocks for layer in layers} | {"decoder.embed.weight"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {names[id(value)] for group in groups for value in group["params"]} == trained


@pytest.mark.parametrize(
    "name",
    ["encoder.head.weight", "head.fc.weight", "rel_pos_bias.relative_position_bias_table", "each.1.project.0.weight"],
)
def test_matrices_of_outputs_and_positions_are_adamws(name: str) -> None:
    assert not is_hidden_matrix(name, torch.zeros(4, 4))
    assert is_hidden_matrix("encoder.blocks.0.mlp.fc1.weight", torch.zeros(4, 4))


def test_every_classifier_of_timm_is_an_output() -> None:
    names: set[str] = set()
    for cfg in filter(None, map(get_pretrained_cfg, timm.list_models())):
        names |= set(cfg.classifier if isinstance(cfg.classifier, tuple) else (cfg.classifier or "head",))
    assert len(names) > 10
    assert not [name for name in names if is_hidden_matrix(f"encoder.{name}.weight", torch.zeros(4, 4))]


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five iterations of Jordan et al.: X <- a X + (b A + c A A) X with A = X X^T, from X of Frobenius norm 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    result = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        gram = result @ result.T
        result = a * result + (b * gram + c * gram @ gram) @ result
    return result


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_a_matrix_takes_the_papers_update(shape: tuple[int, int], momentum: float) -> None:
    """In float64 and without torch; torch's bf16 is off by up to 3 % of a direction's norm on such matrices."""
    model = Layers(*shape)
    guard = optimizer(model, config(momentum=momentum))
    weight, buffer = model.hidden.weight.detach().double().numpy().copy(), np.zeros(shape)
    for step in range(4):
        set_gradients(model, step)
        assert model.hidden.weight.grad is not None
        gradient = model.hidden.weight.grad.double().numpy()
        buffer = momentum * buffer + (1 - momentum) * gradient
        direction = orthogonalized((1 - momentum) * gradient + momentum * buffer)
        guard.step()
        size = 0.1 * 0.2 * np.sqrt(max(shape))  # as large as AdamW's (Liu et al., 2025)
        found = (weight * (1 - 0.1 * 0.2) - model.hidden.weight.detach().double().numpy()) / size
        assert np.linalg.norm(found - direction) < 0.05 * np.linalg.norm(direction)
        kept = get_or_create_moments(guard, model.hidden.weight)
        assert kept.keys() == {"momentum_buffer"}
        np.testing.assert_allclose(kept["momentum_buffer"].numpy(), buffer, rtol=1e-5, atol=1e-7)
        weight = model.hidden.weight.detach().double().numpy().copy()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_all_others_take_adamws_bit_for_bit(clip: float | None, fused: bool) -> None:
    """Clipped by the norm of all gradients, those of Muon's matrices too."""
    model, reference = Layers(), Layers()
    guard = optimizer(model, config(max_grad_norm=clip, fused=fused, betas=(0.8, 0.9), eps=1e-6))
    vectors, head = [reference.hidden.bias, reference.head.bias], [reference.head.weight]
    adamw = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": head, "weight_decay": 0.2}],
        lr=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=fused,
    )
    for step in range(4):
        for layers in (model, reference):
            set_gradients(layers, step)
        norm = nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
        guard.step()
        adamw.step()
        assert guard.grad_norm == float(norm) > 0.5
        ours = (model.hidden.bias, model.head.bias, model.head.weight)
        assert all(here.equal(there) for here, there in zip(ours, (*vectors, *head), strict=True))
    assert get_num_updates(guard) == 4


@pytest.mark.parametrize("place", ["hidden.weight", "head.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(place: str, bad: float) -> None:
    """Neither the matrices of Muon nor the parameters of AdamW, wherever the gradient is bad."""
    model, reference = Layers(), Layers()
    guard, untouched = (optimizer(layers, config(max_grad_norm=1.0)) for layers in (model, reference))
    for step in range(3):
        before = copy_state(model, guard)
        set_gradients(model, 100 + step)
        gradient = model.get_parameter(place).grad
        assert gradient is not None
        gradient[0, 0] = bad
        guard.step()
        assert not guard.step_applied
        assert equal(before, copy_state(model, guard))
        for layers, updated in ((model, guard), (reference, untouched)):
            set_gradients(layers, step)
            updated.step()
        assert equal(copy_state(model, guard), copy_state(reference, untouched))
    assert not equal(before, copy_state(model, guard))
    assert get_num_updates(guard) == 3


def test_a_group_has_its_own_rate() -> None:
    """Both rules read the rate that an engine sets, times lr_scale; a rate of 0 leaves the layer alone."""
    model, cfg = Layers(), config(layer_decay=0.5)
    guard = build_optimizer(parameter_groups(model, cfg, lambda name: int("head" in name), 1), cfg)
    assert {group["name"]: group["lr_scale"] for group in guard.param_groups} == {
        "layer 0, decay, hidden matrices": 0.5,
        "layer 0, no decay": 0.5,
        "layer 1, decay": 1.0,
        "layer 1, no decay": 1.0,
    }
    before = copy.deepcopy(model.state_dict())
    for group in guard.param_groups:
        group["lr"] = 0.0 if group["lr_scale"] == 0.5 else 0.1
    set_gradients(model, 0)
    guard.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_momentum_of_muon_is_the_papers_unless_it_is_set() -> None:
    assert OptimConfig.model_validate({"name": "muon"}).momentum == 0.95
    assert OptimConfig.model_validate({"name": "muon", "momentum": 0.9}).momentum == 0.9
    assert OptimConfig.model_validate({"name": "sgd"}).momentum == OptimConfig().momentum == 0.9


def test_a_model_without_hidden_matrices_is_adamws(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with caplog.at_level(logging.WARNING):
        guard = optimizer(model, config())
    assert "no hidden matrix to train" in caplog.text
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    guard.step()
    assert not model.state_dict()["0.weight"].equal(before["0.weight"])
