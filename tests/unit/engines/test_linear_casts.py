"""Weights cast together give the bits of autocast: outputs, and gradients of every weight and input."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveal.engines.config import EngineConfig
from foveal.engines.linear_casts import make_linear_casts


class Model(nn.Module):
    """Layers used once, twice, without a bias, frozen, frozen in part, and read without a call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7, bias=number != 2) for number in range(6))
        self.layers[3].requires_grad_(False)
        self.layers[4].get_parameter("bias").requires_grad_(False)
        self.read = nn.Linear(7, 7)
        self.unused = nn.Linear(7, 7)

    def forward(self, rows: Tensor, recompute: bool) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            rows = rows + (checkpoint(layer, rows.tanh(), use_reentrant=False) if recompute else layer(rows.tanh()))
        return nn.functional.linear(rows, self.read.weight, self.read.bias)


def outputs_and_gradients(precision: str, compiled: bool, recompute: bool, together: bool) -> list[Tensor | None]:
    model = Model()
    cfg = EngineConfig.model_validate({"kind": "plain", "precision": precision, "compile": compiled})
    use = make_linear_casts(model, cfg)
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found: list[Tensor | None] = []
    for _ in range(2):  # the second microbatch adds to the gradients of the first
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if together:
                with use():
                    output = model(rows, recompute)
                    output.square().sum().backward()
            else:
                output = model(rows, recompute)
                output.square().sum().backward()
        found.append(output.detach())
    return [*found, rows.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_bits_are_those_of_autocast(recompute: bool) -> None:
    pairs = zip(*(outputs_and_gradients("bf16", False, recompute, each) for each in (True, False)), strict=True)
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)  # type: ignore[arg-type, union-attr]


def test_layers_compute_with_copies_inside_a_microbatch_only() -> None:
    model = Model()
    use = make_linear_casts(model, EngineConfig(kind="plain", precision="bf16"))
    layer, rows = model.layers[0], torch.ones(1, 7)
    with use():
        with torch.no_grad():
            layer.get_parameter("weight").zero_()  # after the copies were made
        assert layer(rows.bfloat16()).sub(layer.get_parameter("bias").bfloat16()).any()
    assert torch.equal(layer(rows)[0], layer.get_parameter("bias"))
    with pytest.raises(ZeroDivisionError), use():
        raise ZeroDivisionError
    assert torch.equal(layer(rows)[0], layer.get_parameter("bias"))


@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"precision": "bf16", "compile": True}])
def test_fp32_and_compiled_models_keep_their_layers(settings: dict[str, object]) -> None:
    model = Model()
    with make_linear_casts(model, EngineConfig.model_validate({"kind": "plain"} | settings))():
        assert all("forward" not in vars(module) for module in model.modules())
