"""What an encoder makes of images, or of some of their patches, as far as a given block.

B images, L patches, K kept, R registers, D width, N = 1 + R + K tokens: the class token first, then registers, then patches.
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
    get_rotary_embeddings,
    set_visible_indices,
)


def encode(encoder: Encoder, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
    """Features [B, N, D] after the last norm, of normalised images [B, C, H, W]; the kept patches [B, K] in their order.

    None keeps them all.
    """
    return encoder.norm(encode_layers(encoder, images, [len(encoder.blocks)], visible_indices)[0])


def encode_layers(
    encoder: Encoder, images: Tensor, depths: Sequence[int], visible_indices: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Tokens [B, N, D] as they leave so many blocks (0: as they enter the first), one for each of ``depths``.

    No block is run beyond the deepest.
    """
    blocks, turned, recompute = (
        list(encoder.blocks),
        get_rotary_embeddings(encoder, visible_indices),
        encoder.grad_checkpointing,
    )
    set_visible_indices(encoder, visible_indices)
    found = {0: _embed_patches(encoder, images, visible_indices)}
    for start, stop in zip([0, *sorted(depths)], sorted(depths), strict=False):
        found[stop] = run_blocks(blocks[start:stop], found[start], recompute, turned[start:stop])
    return tuple(found[depth] for depth in depths)


def encode_cls_and_patches(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """What an encoder makes of normalised images [B, C, H, W] after its last norm: (class token [B, D], patches [B, L, D])."""
    assert not isinstance(encoder.norm, nn.Identity), "an encoder pooled by 'avg' has its norm after the pooling"
    tokens_BND = encode(encoder, images)
    return tokens_BND[:, 0], tokens_BND[:, encoder.num_prefix_tokens :]


def drop_registers(encoder: Encoder, tokens: Tensor) -> Tensor:
    """The class token and the patches of tokens [B, N, D], as [B, 1 + K, D]: two encoders may differ in registers."""
    first = encoder.num_prefix_tokens
    return tokens if first == 1 else torch.cat([tokens[:, :1], tokens[:, first:]], dim=1)


def find_external_parameters(encoder: Encoder) -> list[nn.Parameter]:
    """The parameters that ``encode_layers`` reads outside the module that owns them.

    ZeRO 3 gathers a module's parameters when that module is called; a compiled forward must be told of the others
    (``deepspeed.zero.register_external_parameter``), an eager one finds them.
    """
    parts: Any = encoder
    embed = parts.patch_embed.proj
    read = (parts.cls_token, getattr(parts, "reg_token", None), getattr(parts, "pos_embed", None))
    read += (embed.weight, embed.bias)
    return [parameter for parameter in read if isinstance(parameter, nn.Parameter)] + find_cross_module_parameters(
        encoder
    )


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    recompute_activations: bool,
    block_args: Sequence[tuple[Tensor, ...]] = (),
) -> Tensor:
    """Tokens [B, N, D] through the blocks; with ``checkpointing`` each block is recomputed in the backward pass.

    ``beside`` are further arguments of each block; empty where they take none.
    """
    recompute = recompute_activations and torch.is_grad_enabled()
    for block, more in zip(blocks, block_args or itertools.repeat(()), strict=bool(block_args)):
        tokens = checkpoint(block, tokens, *more, use_reentrant=False) if recompute else block(tokens, *more)
    return tokens


def _embed_patches(encoder: Any, images: Tensor, visible_indices: Tensor | None) -> Tensor:
    patches = patchify(images, encoder.patch_embed.patch_size[0])
    if visible_indices is not None:
        patches = gather_patches(
            patches, visible_indices
        )  # before the embedding: what is masked costs nothing and cannot leak
    weight = encoder.patch_embed.proj.weight.flatten(1)
    tokens = F.linear(patches.to(weight.dtype), weight, encoder.patch_embed.proj.bias)
    tokens = add_positions_and_prefix(encoder, tokens, visible_indices)
    return encoder.norm_pre(tokens) if hasattr(encoder, "norm_pre") else tokens
