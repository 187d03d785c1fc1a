"""The decoder's short cuts compute what timm's blocks compute on all tokens, and fewer rows of it."""

from functools import partial
from typing import Any

import pytest
import torch
from decoding import decode_all_tokens
from torch import Tensor

from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import Decoder
from foveal.models.patches import split_patches_by_noise
from foveal.models.vit import build_encoder

IMAGES, PATCHES, PREFIX, RATIO = 3, 16, 3, 0.6


def decoder_of(depth: int) -> Decoder:
    torch.manual_seed(0)
    encoder = build_encoder(
        VitConfig(patch=4, width=32, depth=1, heads=2, registers=PREFIX - 1), image_size=16, channels=3
    )
    decoder = Decoder(DecoderConfig(width=16, depth=depth, heads=2), encoder).double()
    for parameter in decoder.parameters():  # biases and norms that are not 0 and 1 leave no mistake unseen
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "explicit"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_output_and_gradients_are_those_of_all_tokens(depth: int, fused: bool, recompute: bool) -> None:
    decoder = decoder_of(depth)
    decoder.grad_checkpointing = recompute
    for block in decoder.blocks:
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    visible, masked = split_patches_by_noise(torch.rand(IMAGES, PATCHES), RATIO)
    features = torch.randn(IMAGES, PREFIX + visible.shape[1], 32, dtype=torch.float64, requires_grad=True)
    inputs = [features, *decoder.parameters()]
    outputs = []
    for forward in (decoder, lambda *given: decode_all_tokens(decoder, *given)):
        prediction = forward(features, visible, masked)
        weights = torch.linspace(-1, 1, prediction.numel(), dtype=torch.float64).view_as(prediction)
        outputs.append([prediction, *torch.autograd.grad((prediction * weights).sum(), inputs)])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_shared_rows_are_computed_once_and_unread_rows_never() -> None:
    decoder = decoder_of(3)
    visible, masked = split_patches_by_noise(torch.rand(IMAGES, PATCHES), RATIO)
    rows: dict[str, int] = {}

    def record_output(name: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        rows[name] = output[..., 0].numel()

    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(record_output, name))
    decoder(torch.randn(IMAGES, PREFIX + visible.shape[1], 32, dtype=torch.float64), visible, masked)
    all_rows, read_rows = IMAGES * (PREFIX + PATCHES), IMAGES * masked.shape[1]
    assert rows["blocks.0.attn.qkv"] == all_rows - read_rows + PATCHES
    assert rows["blocks.1.mlp.fc1"] == all_rows
    assert rows["blocks.2.mlp.fc1"] == rows["blocks.2.attn.proj"] == read_rows
