"""Attention that is recorded is the encoder's own, and its numbers are those of their papers."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from encoders import KINDS, encoder_of
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from foveal.inspect.encoder.attention import AttentionMeter, recorded_attention
from foveal.models.backbone import build_backbone


class FusedCalls(TorchFunctionMode):
    """Keeps the values and outputs of torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[2][0], output[0]))
        return output


def images(size: int = 16) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def record(encoder: Any, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """The weights [H, N, N] of every block, and the encoder's output."""
    weights: dict[int, Tensor] = {}

    def keep(block: int, heads: Iterator[Tensor]) -> None:
        weights[block] = torch.stack(list(heads))

    with recorded_attention(list(encoder.blocks), keep):
        output = encoder(pixels)
    assert sorted(weights) == list(range(len(encoder.blocks)))
    return [weights[block] for block in sorted(weights)], output


def encoders() -> Iterator[Any]:
    for name, positions in KINDS:
        yield pytest.param(partial(encoder_of, name, positions), id=f"{name}-{positions}")
    for name in ("test_vit", "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"):
        yield pytest.param(partial(build_backbone, name, 64, 3), id=name)


@pytest.mark.parametrize("build", list(encoders()))
@torch.no_grad()
def test_recorded_weights_times_values_is_what_the_blocks_compute(build: Any) -> None:
    """With every kind of position: those that rotate queries, or add to the logits, too."""
    torch.manual_seed(0)
    encoder = build().eval()
    pixels = images(64 if encoder.patch_embed.img_size[0] == 64 else 16)
    with FusedCalls() as fused:
        weights, _ = record(encoder, pixels)
    assert len(weights) == len(fused.calls) == len(encoder.blocks)
    for weights_HNN, (values, output) in zip(weights, fused.calls, strict=True):
        torch.testing.assert_close(weights_HNN @ values, output)
        torch.testing.assert_close(weights_HNN.sum(-1), torch.ones(weights_HNN.shape[:2]))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_relpos_medium_patch16_cls_224", "eva02_tiny_patch14_224"]
)
def test_attention_without_the_fused_kernel_is_recorded_too(name: str) -> None:
    encoder: Any = encoder_of(name, dict(KINDS)[name]).eval()
    fused, _ = record(encoder, images())
    for block in encoder.blocks:
        block.attn.fused_attn = False
    for explicit, other in zip(record(encoder, images())[0], fused, strict=True):
        torch.testing.assert_close(explicit, other)


@torch.no_grad()
def test_the_forward_keeps_its_bits_and_the_encoder_no_hooks() -> None:
    encoder: Any = encoder_of("vit_tiny_patch16_224", "sincos").eval()
    before = encoder(images())
    assert torch.equal(record(encoder, images())[1], before)

    def refuse(_block: int, _heads: Iterator[Tensor]) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), recorded_attention(list(encoder.blocks), refuse):
        encoder(images())
    assert not [module for module in encoder.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert torch.equal(encoder(images()), before)


def meter_of(*blocks: Tensor, prefix: int = 1, grid: tuple[int, int] = (2, 2)) -> AttentionMeter:
    """A meter that was given the weights [H, N, N] of an image's blocks; patches are 4 x 8 pixels."""
    meter = AttentionMeter(grid, (4, 8), prefix, len(blocks), has_class_token=prefix > 0)
    for number, weights in enumerate(blocks):
        meter.add(number, iter(weights))
    meter.end_image()
    return meter


def test_distance_is_in_pixels_and_of_patches_only() -> None:
    itself = torch.eye(5)
    below = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0.0]])
    mostly_token = 0.25 * below
    mostly_token[:, 0] += 0.75
    meter = meter_of(torch.stack([itself, below, mostly_token]))
    np.testing.assert_allclose(meter.distances[0], [[0, 4, 4]])  # a patch is 4 pixels high
    across = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0.0]])
    np.testing.assert_allclose(meter_of(across[None]).distances[0], [[8]])
    uniform = meter_of(torch.full((1, 5, 5), 0.2))
    assert uniform.distances[0][0, 0] == pytest.approx((0 + 4 + 8 + math.hypot(4, 8)) / 4)
    assert uniform.uniform_distance() == pytest.approx(uniform.distances[0][0, 0])


def test_entropy_is_in_nats_and_over_all_tokens() -> None:
    uniform, itself = torch.full((5, 5), 0.2), torch.eye(5)
    np.testing.assert_allclose(meter_of(torch.stack([uniform, itself])).entropies[0], [[math.log(5), 0]], atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_rollout_is_the_product_over_blocks_of_half_attention_half_residual(prefix: int) -> None:
    """Abnar and Zuidema, 2020: of the class token, or of an encoder without one the mean over patches."""
    blocks = [torch.rand(2, prefix + 4, prefix + 4).softmax(-1) for _ in range(3)]
    expected = torch.eye(prefix + 4)
    for weights in blocks:
        expected = (0.5 * weights.mean(0) + 0.5 * torch.eye(prefix + 4)) @ expected
    meter = meter_of(*blocks, prefix=prefix)
    torch.testing.assert_close(meter.rollouts[0], expected[0] if prefix else expected.mean(0))
    torch.testing.assert_close(meter.head_maps[0], blocks[-1][:, 0] if prefix else blocks[-1].mean(1))


def test_blocks_that_see_other_tokens_are_named() -> None:
    assert "other tokens" in meter_of(torch.eye(4)[None]).problem
    nothing = AttentionMeter((2, 2), (4, 4), 1, 2, has_class_token=True)
    nothing.end_image()
    assert "no softmax attention" in nothing.problem
