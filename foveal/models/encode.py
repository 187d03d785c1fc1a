"""Forward passes of an encoder over all or some patches of an image, up to a given block.

B images, L patches, K visible, R registers, D width, N = 1 + R + K tokens in the order class token, registers, patches.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveal.models.patches import gather_patches, patchify
from foveal.models.timm_vit import Encoder
from foveal.models.token_positions import (
    add_positions_and_prefix,
    find_cross_module_parameters,
    rotary_block_args,
    set_relative_bias_indices,
)


def encode(encoder: Encoder, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
    """Return features [B, N, D] after the last norm, of normalised images [B, C, H, W].

    ``visible_indices`` [B, K] selects and orders the patches; None: all patches.
    """
    return encoder.norm(encode_layers(encoder, images, [len(encoder.blocks)], visible_indices)[0])


def encode_layers(
    encoder: Encoder, images: Tensor, block_counts: Sequence[int], visible_indices: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the tokens [B, N, D] after each of ``block_counts`` blocks (0: before the first block).

    Blocks beyond the deepest one are not run.
    """
    blocks = list(encoder.blocks)
    rotary_embeddings = rotary_block_args(encoder, visible_indices)
    recompute = encoder.grad_checkpointing
    set_relative_bias_indices(encoder, visible_indices)
    tokens_by_depth = {0: _embed_patches(encoder, images, visible_indices)}
    for start, stop in zip([0, *sorted(block_counts)], sorted(block_counts), strict=False):
        tokens = tokens_by_depth[start]
        tokens_by_depth[stop] = run_blocks(blocks[start:stop], tokens, recompute, rotary_embeddings[start:stop])
    return tuple(tokens_by_depth[depth] for depth in block_counts)


def encode_cls_and_patches(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (class token [B, D], patches [B, L, D]) after the last norm, of normalised images [B, C, H, W]."""
    assert not isinstance(encoder.norm, nn.Identity), "an encoder pooled by 'avg' has its norm after the pooling"
    tokens_BND = encode(encoder, images)
    return tokens_BND[:, 0], tokens_BND[:, encoder.num_prefix_tokens :]


def drop_registers(encoder: Encoder, tokens: Tensor) -> Tensor:
    """Return tokens [B, N, D] without registers, [B, 1 + K, D], so that encoders with different registers compare."""
    num_prefix = encoder.num_prefix_tokens
    return tokens if num_prefix == 1 else torch.cat([tokens[:, :1], tokens[:, num_prefix:]], dim=1)


def find_external_parameters(encoder: Encoder) -> list[nn.Parameter]:
    """Return the parameters that ``encode_layers`` reads outside the module that owns them.

    ZeRO 3 gathers a module's parameters when that module is called. Parameters read elsewhere must be registered
    (``deepspeed.zero.register_external_parameter``) for a compiled forward; an eager forward detects them.
    """
    untyped_encoder: Any = encoder
    projection = untyped_encoder.patch_embed.proj
    candidates = (
        untyped_encoder.cls_token,
        getattr(untyped_encoder, "reg_token", None),
        getattr(untyped_encoder, "pos_embed", None),
        projection.weight,
        projection.bias,
    )
    parameters = [candidate for candidate in candidates if isinstance(candidate, nn.Parameter)]
    return parameters + find_cross_module_parameters(encoder)


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    recompute_activations: bool,
    block_args: Sequence[tuple[Any, ...]] = (),
) -> Tensor:
    """Return tokens [B, N, D] after the blocks.

    ``recompute_activations`` recomputes each block in the backward pass. ``block_args`` holds further arguments of each
    block; empty if the blocks take none.
    """
    recompute = recompute_activations and torch.is_grad_enabled()
    for block, args in zip(blocks, block_args or itertools.repeat(()), strict=bool(block_args)):
        tokens = checkpoint(block, tokens, *args, use_reentrant=False) if recompute else block(tokens, *args)
    return tokens


def _embed_patches(encoder: Any, images: Tensor, visible_indices: Tensor | None) -> Tensor:
    patches = patchify(images, encoder.patch_embed.patch_size[0])
    if visible_indices is not None:
        # Before the embedding, so that masked patches cost nothing and cannot leak.
        patches = gather_patches(patches, visible_indices)
    weight = encoder.patch_embed.proj.weight.flatten(1)
    tokens = F.linear(patches.to(weight.dtype), weight, encoder.patch_embed.proj.bias)
    tokens = add_positions_and_prefix(encoder, tokens, visible_indices)
    return encoder.norm_pre(tokens) if hasattr(encoder, "norm_pre") else tokens
