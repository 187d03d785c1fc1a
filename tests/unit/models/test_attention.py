"""Attention has the bits of timm's, in its output and in every gradient, and copies less."""

from functools import partial

import pytest
import torch
from operations import OperationCounter
from timm.layers.attention import Attention
from torch import nn

from foveal.models.attention import SelfAttention

IMAGES, TOKENS, WIDTH = 2, 9, 24
KINDS = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "gated": {"gated": True},
}


def attentions(kind: str, fused: bool) -> tuple[SelfAttention, Attention]:
    torch.manual_seed(0)
    ours = SelfAttention(WIDTH, num_heads=3, qkv_bias=True, **KINDS[kind])
    theirs = Attention(WIDTH, num_heads=3, qkv_bias=True, **KINDS[kind])
    theirs.load_state_dict(ours.state_dict())
    ours.fused_attn = theirs.fused_attn = fused  # type: ignore[misc]
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "explicit"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_timm(kind: str, fused: bool, masked: bool) -> None:
    found = []
    for attention in attentions(kind, fused):
        tokens = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if masked else None
        output = attention(tokens, attn_mask=mask)
        inputs = [tokens, *attention.parameters()]
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_gradients_are_copied_once() -> None:
    copies = []
    for attention in attentions("plain", True):
        with OperationCounter() as counter:
            attention(torch.randn(IMAGES, TOKENS, WIDTH)).sum().backward()
        copies.append(sum(counter.operations[name] for name in ("clone", "stack", "copy_")))
    assert copies[0] < copies[1]
