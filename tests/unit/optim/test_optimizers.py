"""Parameter groups, guarded AdamW and clipping equal to torch, and skipped steps that change nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.model import _vit_layer_index
from foveal.models.classify import Classifier
from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder
from foveal.optim.config import OptimConfig
from foveal.optim.moments import get_or_create_moments
from foveal.optim.optimizers import GuardedAdamW, build_unguarded_adamw, parameter_groups

TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=8, depth=2, heads=2)


def table(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, tuple[float, float]]:
    """Map each parameter's name to (weight decay, learning-rate scale)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in groups
        for parameter in group["params"]
    }


def test_matrices_decay_and_vectors_tokens_and_positions_do_not() -> None:
    learned = TINY.model_copy(update={"positions": "learned"})
    model = MaskedAutoencoder(
        build_encoder(learned, image_size=8, channels=1), DecoderConfig(width=8, depth=1, heads=2)
    )
    settings = table(parameter_groups(model, OptimConfig(weight_decay=0.3)), model)
    assert settings.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    undecayed = {name for name, (decay, _) in settings.items() if decay == 0.0}
    assert {name for name, (decay, _) in settings.items() if decay == 0.3} == settings.keys() - undecayed
    assert undecayed == {name for name in settings if name.endswith((".bias", "_token", "pos_embed"))} | {
        name for name in settings if "norm" in name
    }
    assert {
        "encoder.cls_token",
        "encoder.pos_embed",
        "decoder.mask_token",
        "encoder.blocks.0.norm1.weight",
    } <= undecayed
    assert {"encoder.patch_embed.proj.weight", "decoder.predict.weight"} <= settings.keys() - undecayed
    assert {scale for _, scale in settings.values()} == {1.0}


def test_layers_learn_more_slowly_the_deeper_they_lie() -> None:
    encoder = build_encoder(TINY, image_size=8, channels=1, pooling="avg", num_classes=3)
    model = Classifier(encoder)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5), _vit_layer_index(2), 3)
    settings = table(groups, model)
    assert "encoder.pos_embed" not in settings  # fixed positions do not learn
    assert settings.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = {
        "encoder.cls_token": 0.125,
        "encoder.patch_embed": 0.125,
        "encoder.blocks.0": 0.25,
        "encoder.blocks.1": 0.5,
        "encoder.fc_norm": 1.0,
        "encoder.head": 1.0,
    }
    for name, (decay, scale) in settings.items():
        assert scale == next(expected for prefix, expected in scales.items() if name.startswith(prefix)), name
        assert decay == (0.0 if name.endswith(("bias", "token")) or "norm" in name else 0.05), name
    assert [group["name"] for group in groups[:3]] == ["layer 0, no decay", "layer 0, decay", "layer 1, no decay"]


def test_what_is_frozen_is_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert table(parameter_groups(model, OptimConfig()), model).keys() == {"1.weight", "1.bias"}


def test_peak_is_per_256_images() -> None:
    assert OptimConfig(lr_per_256=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def gradients(step: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [size * torch.randn(3, 5, generator=generator), size * torch.randn(3, generator=generator)]


def set_gradients(model: nn.Module, grads: list[Tensor]) -> None:
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone()


def guarded(model: nn.Module, cfg: OptimConfig) -> GuardedAdamW:
    return GuardedAdamW(parameter_groups(model, cfg), cfg)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_with_finite_gradients_it_is_torchs_adamw_bit_for_bit(fused: bool, clip: float | None) -> None:
    cfg = OptimConfig(lr_per_256=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, max_grad_norm=clip, fused=fused)
    model, torch_model = layer(), layer()
    guard = guarded(model, cfg)
    adamw = torch.optim.AdamW(
        [{"params": [torch_model.weight], "weight_decay": 0.1}, {"params": [torch_model.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=fused,
    )
    for step in range(5):
        set_gradients(model, gradients(step))
        set_gradients(torch_model, gradients(step))
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), clip or float("inf"))
        guard.step()
        adamw.step()
        assert guard.step_applied
        assert guard.grad_norm == float(norm) > 0.5
        assert model.weight.equal(torch_model.weight)
        assert model.bias.equal(torch_model.bias)


def test_a_small_gradient_is_not_clipped_up() -> None:
    clipped, free = layer(), layer()
    for model, clip in ((clipped, 10.0), (free, None)):
        guard = guarded(model, OptimConfig(max_grad_norm=clip))
        set_gradients(model, gradients(0, 0.01))
        guard.step()
    assert clipped.weight.grad is not None
    assert clipped.weight.grad.equal(gradients(0, 0.01)[0])
    assert clipped.weight.equal(free.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, place: str, clip: float | None, fused: bool) -> None:
    """Weights, moments and counters stay bit for bit; later steps equal those of an optimizer without the bad step."""
    cfg = OptimConfig(lr_per_256=1e-2, max_grad_norm=clip, fused=fused)
    model, reference = layer(), layer()
    guard, untouched = guarded(model, cfg), guarded(reference, cfg)
    for parameter in model.parameters():
        get_or_create_moments(guard, parameter)
    for step in range(4):
        before = copy.deepcopy((model.state_dict(), guard.state_dict()["state"]))
        set_gradients(model, gradients(100 + step))
        getattr(model, place).grad.view(-1)[0] = bad
        guard.step()
        assert not guard.step_applied
        assert not guard.grad_norm.isfinite()
        assert_equal(before, (model.state_dict(), guard.state_dict()["state"]))
        for updated, optimizer in ((model, guard), (reference, untouched)):
            set_gradients(updated, gradients(step))
            optimizer.step()
        assert guard.step_applied
        assert model.weight.equal(reference.weight)
        assert model.bias.equal(reference.bias)


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert bitwise equality, also of tensors inside tuples and dicts."""
    if isinstance(actual, Tensor):
        assert actual.equal(expected)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert_equal(value, expected[name])
    elif isinstance(actual, tuple):
        for value, reference in zip(actual, expected, strict=True):
            assert_equal(value, reference)
    else:
        assert actual == expected


def test_a_parameter_without_a_gradient_is_left_out() -> None:
    model = layer()
    before = model.bias.clone()
    guard = guarded(model, OptimConfig(max_grad_norm=1.0))
    model.weight.grad = gradients(0)[0]
    guard.step()
    assert guard.step_applied
    assert float(guard.grad_norm) == pytest.approx(float(gradients(0)[0].norm()), rel=1e-6)
    assert model.bias.equal(before)


def test_plain_adamw_has_the_settings_and_the_groups() -> None:
    model = layer()
    cfg = OptimConfig(lr_per_256=0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.7, fused=False)
    optimizer = build_unguarded_adamw(parameter_groups(model, cfg), cfg)
    assert type(optimizer) is torch.optim.AdamW
    settings = [(group["lr"], group["betas"], group["eps"], group["fused"]) for group in optimizer.param_groups]
    assert settings == [(0.5, (0.1, 0.2), 1e-3, False)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_per_256", 0.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("layer_decay", 1.1),
        ("max_grad_norm", 0.0),
        ("min_lr", -1.0),
    ],
)
def test_settings_have_limits(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        OptimConfig(**{name: value})  # pyright: ignore[reportArgumentType]
