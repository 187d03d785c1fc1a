"""The masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022).

B images, L patches, K kept, M masked, D encoder width, P numbers per patch.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from pydantic import model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveal.config import Config, science
from foveal.models.outline import Encoder
from foveal.models.patches import patchify, split_by_noise, take
from foveal.models.places import read_across, rotations, set_kept, with_positions
from foveal.models.positions import sincos_positions
from foveal.models.vit import TOKEN_SCALE, initialise_linear

NORM_FLOOR = 1e-6  # timm's transformers and the reference implementation of MAE; torch's default is 1e-5


class DecoderConfig(Config):
    """The transformer that reconstructs pixels; it is thrown away after pretraining."""

    width: int = science(512, "numbers per token; a multiple of 4 and of heads", ge=4)
    depth: int = science(8, "blocks", ge=1)
    heads: int = science(16, "attention heads", ge=1)
    mlp_ratio: float = science(4.0, "hidden width of a block's MLP over the token width", gt=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % 4 or self.width % self.heads:
            step = math.lcm(4, self.heads)
            nearest = step * max(1, round(self.width / step))
            raise ValueError(f"width={self.width} is not a multiple of 4 and of heads={self.heads}; width={nearest} is")
        return self


class Decoder(nn.Module):
    """From the features of visible patches to the pixels of masked ones."""

    positions: Tensor

    def __init__(self, cfg: DecoderConfig, encoder: Encoder) -> None:
        super().__init__()
        patch_embed: Any = encoder.patch_embed
        rows, columns = patch_embed.grid_size
        self.embed = nn.Linear(encoder.embed_dim, cfg.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.width))
        # Not a parameter and not in the state: it is a formula, and ZeRO shards only what is learned.
        self.register_buffer("positions", sincos_positions(rows, columns, cfg.width), persistent=False)
        self.blocks = nn.Sequential(*(_decoder_block(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(cfg.width, eps=NORM_FLOOR)
        self.predict = nn.Linear(cfg.width, patch_embed.proj.weight[0].numel())
        self.grad_checkpointing = False
        initialise_linear(self)
        nn.init.normal_(self.mask_token, std=TOKEN_SCALE)

    def forward(self, features: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Pixels [B, M, P] of the masked patches, from features [B, 1 + K, D] and the places [B, K] and [B, M].

        The tokens stay in the order class, kept, masked: attention has no order, and the positions say where they are.
        """
        tokens = self.embed(features)
        positions = self.positions.to(self.mask_token.dtype)  # engines that lower the weights may leave buffers alone
        visible = tokens[:, 1:] + positions[kept]
        hidden = self.mask_token + positions[masked]
        tokens = torch.cat([tokens[:, :1], visible, hidden], dim=1)
        tokens = run_blocks(self.blocks, tokens, self.grad_checkpointing)
        return self.predict(self.norm(tokens[:, 1 + kept.shape[1] :]))


class MaskedAutoencoder(nn.Module):
    """An encoder that sees the visible patches alone, and a decoder that guesses the others."""

    def __init__(self, encoder: Encoder, cfg: DecoderConfig) -> None:
        """The decoder is drawn from torch's global generator, like the encoder before it (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(cfg, encoder)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """Guess the masked patches: (pixels [B, M, P], their places [B, M] int64).

        ``images`` [B, C, H, W] are normalised; ``noise`` [B, L], float32 or float64, decides which patches are masked
        (``split_by_noise``): uniform numbers, or what a kind of masking makes of them (``foveal.models.masks``).
        """
        kept, masked = split_by_noise(noise, mask_ratio)
        return self.decoder(self.encode(images, kept), kept, masked), masked

    def encode(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Features [B, 1 + K, D] of the class token and the kept patches [B, K], in their order; None keeps them all."""
        encoder: Any = self.encoder
        patches = patchify(images, encoder.patch_embed.patch_size[0])
        if kept is not None:
            patches = take(patches, kept)  # before the embedding: what is masked costs nothing and cannot leak
        weight = encoder.patch_embed.proj.weight.flatten(1)
        tokens = F.linear(patches.to(weight.dtype), weight, encoder.patch_embed.proj.bias)
        tokens = with_positions(encoder, tokens, kept)
        if hasattr(encoder, "norm_pre"):
            tokens = encoder.norm_pre(tokens)
        set_kept(encoder, kept)
        tokens = run_blocks(encoder.blocks, tokens, encoder.grad_checkpointing, rotations(encoder, kept))
        return encoder.norm(tokens)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a forward reads outside the module that owns them.

        ZeRO 3 gathers a module's parameters when that module is called; a compiled forward must be told of the others
        (``deepspeed.zero.register_external_parameter``), an eager one finds them.
        """
        encoder: Any = self.encoder
        embed = encoder.patch_embed.proj
        read = (encoder.cls_token, getattr(encoder, "pos_embed", None), embed.weight, embed.bias)
        return [parameter for parameter in read if isinstance(parameter, nn.Parameter)] + read_across(encoder)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Keep only the inputs of the blocks for the backward pass and compute the rest again (less memory, same loss)."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


def run_blocks(
    blocks: nn.Sequential | nn.ModuleList,
    tokens: Tensor,
    checkpointing: bool,
    beside: Sequence[tuple[Tensor, ...]] = (),
) -> Tensor:
    """Tokens [B, N, D] through the blocks; with ``checkpointing`` each block is recomputed in the backward pass.

    ``beside`` are further arguments of each block; empty where they take none.
    """
    recompute = checkpointing and torch.is_grad_enabled()
    for block, more in zip(blocks, beside or [()] * len(blocks), strict=True):
        tokens = checkpoint(block, tokens, *more, use_reentrant=False) if recompute else block(tokens, *more)
    return tokens


def _decoder_block(cfg: DecoderConfig) -> Block:
    norm = partial(nn.LayerNorm, eps=NORM_FLOOR)
    # timm declares a class and calls it: anything that makes a norm from a width will do.
    return Block(cfg.width, cfg.heads, mlp_ratio=cfg.mlp_ratio, qkv_bias=True, norm_layer=norm)  # pyright: ignore[reportArgumentType]
