"""The masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022).

B images, L patches, K kept, M masked, R registers, N = 1 + R + K tokens, D encoder width, P numbers per patch.
"""

import copy
import math
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from pydantic import model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from foveal.config import Config, science
from foveal.models.encode import encode, encode_cls_and_patches, find_external_parameters, run_blocks
from foveal.models.patches import split_patches_by_noise
from foveal.models.sincos import sincos_positions
from foveal.models.timm_vit import Encoder
from foveal.models.vit import TOKEN_INIT_STD, init_linear_layers

LAYER_NORM_EPS = 1e-6  # timm's transformers and the reference implementation of MAE; torch's default is 1e-5


class DecoderConfig(Config):
    """The transformer that guesses what is masked; it is thrown away after pretraining."""

    width: int = science(512, "numbers per token; a multiple of 4 and of heads", ge=4)
    depth: int = science(8, "blocks", ge=1)
    heads: int = science(16, "attention heads", ge=1)
    mlp_ratio: float = science(4.0, "hidden width of a block's MLP over the token width", gt=0)

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.width % 4 or self.width % self.heads:
            step = math.lcm(4, self.heads)
            nearest = step * max(1, round(self.width / step))
            raise ValueError(f"width={self.width} is not a multiple of 4 and of heads={self.heads}; width={nearest} is")
        return self


class Decoder(nn.Module):
    """From the features of visible patches to the pixels, or the features, of masked ones."""

    positions: Tensor

    def __init__(self, cfg: DecoderConfig, encoder: Encoder, out_features: int | None = None) -> None:
        """``outputs``: how many numbers it guesses of each masked patch; none: its pixels."""
        super().__init__()
        patch_embed: Any = encoder.patch_embed
        rows, columns = patch_embed.grid_size
        self.embed = nn.Linear(encoder.embed_dim, cfg.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.width))
        # Not a parameter and not in the state: it is a formula, and ZeRO shards only what is learned.
        self.register_buffer("positions", sincos_positions(rows, columns, cfg.width), persistent=False)
        self.blocks = nn.Sequential(*(_build_decoder_block(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(cfg.width, eps=LAYER_NORM_EPS)
        self.predict = nn.Linear(cfg.width, out_features or patch_embed.proj.weight[0].numel())
        self.grad_checkpointing = False
        init_linear_layers(self)
        nn.init.normal_(self.mask_token, std=TOKEN_INIT_STD)

    def forward(self, features: Tensor, visible_indices: Tensor, masked_indices: Tensor) -> Tensor:
        """Guesses [B, M, outputs] of the masked patches, from features [B, N, D] and the places [B, K] and [B, M].

        The tokens stay in the order class, registers, kept, masked: attention has no order, and the positions say where
        they are.
        """
        tokens = self.embed(features)
        first = tokens.shape[1] - visible_indices.shape[1]
        positions = self.positions.to(self.mask_token.dtype)  # engines that lower the weights may leave buffers alone
        visible = tokens[:, first:] + positions[visible_indices]
        hidden = self.mask_token + positions[masked_indices]
        tokens = torch.cat([tokens[:, :first], visible, hidden], dim=1)
        tokens = run_blocks(self.blocks, tokens, self.grad_checkpointing)
        return self.predict(self.norm(tokens[:, first + visible_indices.shape[1] :]))


class MAEOutput(NamedTuple):
    """What a masked autoencoder says of images, and what else its objective needs to know.

    ``patches`` [B, M, P], or [B, M, D] of latents, are those at the places ``masked`` [B, M] int64. ``image`` [B, D] is
    the guess of the whole image's representation, ``seen`` [B, L, D] what the full images' patches are to the encoder
    that is imitated, without a gradient; None where the objective asks for none.
    """

    patch_pred: Tensor
    masked_indices: Tensor
    image_pred: Tensor | None = None
    target_features: Tensor | None = None


class MaskedAutoencoder(nn.Module):
    """An encoder that sees the visible patches alone, and a decoder that guesses the others.

    On request also a head that guesses the whole image's representation from the class token, and a running average of
    the encoder, which an engine moves (``Engine.average``) and which sees full images.
    """

    def __init__(
        self,
        encoder: Encoder,
        cfg: DecoderConfig,
        *,
        predict_features: bool = False,
        predict_image: bool = False,
        with_ema: bool = False,
    ) -> None:
        """The decoder is drawn from torch's global generator, like the encoder before it (``build_encoder``).

        ``latents``: the decoder guesses features instead of pixels; ``image``: there is a head on the class token, drawn
        last; ``averaged``: the average begins as the encoder is now. Without the latter, the encoder itself sees the full
        images, if anything is to be guessed of them.
        """
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(cfg, encoder, encoder.embed_dim if predict_features else None)
        self.guess_image = _build_predictor(encoder.embed_dim) if predict_image else None
        self.averaged = copy.deepcopy(encoder).requires_grad_(False) if with_ema else None
        self._needs_target_features = predict_features or predict_image

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> MAEOutput:
        """Guess the masked patches, and what else there is to guess.

        ``images`` [B, C, H, W] are normalised; ``noise`` [B, L], float32 or float64, decides which patches are masked
        (``split_by_noise``): uniform numbers, or what a kind of masking makes of them (``foveal.models.masks``).
        """
        kept, masked = split_patches_by_noise(noise, mask_ratio)
        seen = self._compute_target_features(
            images
        )  # first: what is computed again in the backward pass must find the kept patches set
        tokens = self.encode(images, kept)
        image = None if self.guess_image is None else self.guess_image(tokens[:, 0])
        return MAEOutput(self.decoder(tokens, kept, masked), masked, image, seen)

    @torch.no_grad()
    def _compute_target_features(self, images: Tensor) -> Tensor | None:
        return encode_cls_and_patches(self.averaged or self.encoder, images)[1] if self._needs_target_features else None

    def encode(self, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        """Features [B, N, D] of the class token, the registers and the kept patches [B, K], in their order; None: all."""
        return encode(self.encoder, images, visible_indices)

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that a forward reads outside the module that owns them (see ``foveal.models.encode``)."""
        return find_external_parameters(self.encoder) + (
            [] if self.averaged is None else find_external_parameters(self.averaged)
        )

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Keep only the inputs of the blocks for the backward pass and compute the rest again (less memory, same loss)."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


def _build_decoder_block(cfg: DecoderConfig) -> Block:
    norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    # timm declares a class and calls it: anything that makes a norm from a width will do.
    return Block(cfg.width, cfg.heads, mlp_ratio=cfg.mlp_ratio, qkv_bias=True, norm_layer=norm)  # pyright: ignore[reportArgumentType]


def _build_predictor(width: int) -> nn.Sequential:
    """What stands between a token and the representation that it is to resemble (BYOL, 2020), without BatchNorm."""
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    init_linear_layers(layers)
    return layers
