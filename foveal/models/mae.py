"""The masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022).

B images, L patches, K visible, M masked, R registers, N = 1 + R + K tokens, D encoder width, P values per patch.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.models.attention import SelfAttention
from foveal.models.config import DecoderConfig
from foveal.models.decoder_block import DecoderBlock, MaskedTokens
from foveal.models.encode import encode, encode_cls_and_patches, find_external_parameters, run_blocks
from foveal.models.patches import split_patches_by_noise
from foveal.models.probes import encode_patch_mean
from foveal.models.sincos import sincos_positions
from foveal.models.timm_vit import Encoder, find_transformer_blocks
from foveal.models.vit import TOKEN_INIT_STD, init_linear_layers

LAYER_NORM_EPS = 1e-6  # as in timm's transformers and the reference implementation of MAE; torch's default is 1e-5


class Decoder(nn.Module):
    """A transformer that predicts the pixels, or features, of masked patches from the features of visible patches."""

    positions: Tensor

    def __init__(self, cfg: DecoderConfig, encoder: Encoder, out_features: int | None = None) -> None:
        """``out_features``: predicted values per masked patch; None: the patch's pixels."""
        super().__init__()
        patch_embed: Any = encoder.patch_embed
        rows, columns = patch_embed.grid_size
        self.embed = nn.Linear(encoder.embed_dim, cfg.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.width))
        # A buffer outside the state: positions follow from a formula, and ZeRO shards only parameters.
        self.register_buffer("positions", sincos_positions(rows, columns, cfg.width), persistent=False)
        self.blocks = nn.Sequential(*(_build_decoder_block(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(cfg.width, eps=LAYER_NORM_EPS)
        self.predict = nn.Linear(cfg.width, out_features or patch_embed.proj.weight[0].numel())
        self.grad_checkpointing = False
        init_linear_layers(self)
        nn.init.normal_(self.mask_token, std=TOKEN_INIT_STD)

    def forward(self, features: Tensor, visible_indices: Tensor, masked_indices: Tensor) -> Tensor:
        """Return predictions [B, M, out_features] of the masked patches, from encoder features [B, N, D].

        ``visible_indices`` is [B, K], ``masked_indices`` [B, M]. Tokens stay in the order class, registers, visible,
        masked: attention ignores order, and position embeddings hold the places.
        """
        tokens = self.embed(features)
        num_prefix = tokens.shape[1] - visible_indices.shape[1]
        positions = self.positions.to(self.mask_token.dtype)  # an engine may lower weights but not buffers
        tokens = tokens + F.pad(positions[visible_indices], (0, 0, num_prefix, 0))  # a prefix has no position
        masked = MaskedTokens(
            self.mask_token[0] + positions, masked_indices, self.mask_token + positions[masked_indices]
        )
        block_args: list[tuple[MaskedTokens | None, int | None]] = [(None, None)] * len(self.blocks)
        block_args[0] = (masked, None)
        block_args[-1] = (block_args[-1][0], masked_indices.shape[1])
        return self.predict(self.norm(run_blocks(self.blocks, tokens, self.grad_checkpointing, block_args)))


class MAEOutput(NamedTuple):
    """Predictions of a masked autoencoder, and the targets that come from an encoder.

    ``patch_pred`` [B, M, P], or [B, M, D] for features, predicts the patches at ``masked_indices`` [B, M] int64.
    ``image_pred`` [B, D] predicts the full image's representation; ``target_features`` [B, L, D] are the target
    encoder's patch features of the full image, without a gradient. Both are None unless the objective uses them.
    """

    masked_patch_pred: Tensor
    masked_indices: Tensor
    image_pred: Tensor | None = None
    target_features: Tensor | None = None


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches, and a decoder that predicts the masked patches.

    Optional: a head that predicts the full image's representation from the class token, and an EMA of the encoder,
    which an engine updates (``Engine.update_ema``) and which encodes full images.
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
        """Draw the decoder from torch's global generator, after the encoder (``build_encoder``).

        ``predict_features``: the decoder predicts features instead of pixels. ``predict_image``: a head on the class
        token, drawn last. ``with_ema``: the EMA starts as a copy of the encoder; without it, the encoder computes the
        target features itself, if any are needed.
        """
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(cfg, encoder, encoder.embed_dim if predict_features else None)
        self.guess_image = _build_predictor(encoder.embed_dim) if predict_image else None
        self.averaged = copy.deepcopy(encoder).requires_grad_(False) if with_ema else None
        self._needs_target_features = predict_features or predict_image

    def forward(
        self,
        images: Tensor,
        mask_noise: Tensor | None = None,
        mask_ratio: float = 0.0,
        *,
        features_only: bool = False,
    ) -> MAEOutput | tuple[Tensor]:
        """Predict the masked patches and, with ``predict_image``, the image's representation.

        ``images`` [B, C, H, W] are normalised; ``mask_noise`` [B, L], float32 or float64, selects the masked patches
        (``split_patches_by_noise``): uniform numbers, or a mask strategy's noise (``foveal.models.masks``).
        ``features_only``: return the encoder's feature ([B, D],) of the full images instead, without masks. It is part
        of the forward because an engine that shards weights gathers them there.
        """
        if features_only:
            return (encode_patch_mean(self.encoder, images),)
        assert mask_noise is not None, "needed for predictions"
        visible_indices, masked_indices = split_patches_by_noise(mask_noise, mask_ratio)
        # First: activations recomputed in the backward pass must find the visible indices set last.
        target_features = self._compute_target_features(images)
        tokens = self.encode(images, visible_indices)
        image_pred = None if self.guess_image is None else self.guess_image(tokens[:, 0])
        patch_pred = self.decoder(tokens, visible_indices, masked_indices)
        return MAEOutput(patch_pred, masked_indices, image_pred, target_features)

    @torch.no_grad()
    def _compute_target_features(self, images: Tensor) -> Tensor | None:
        return encode_cls_and_patches(self.averaged or self.encoder, images)[1] if self._needs_target_features else None

    def encode(self, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        """Return features [B, N, D] of class token, registers and patches ``visible_indices`` [B, K] (None: all)."""
        return encode(self.encoder, images, visible_indices)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a forward reads outside their own module (see ``foveal.models.encode``)."""
        encoders = [self.encoder] if self.averaged is None else [self.encoder, self.averaged]
        return [parameter for encoder in encoders for parameter in find_external_parameters(encoder)]

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks that an engine may compile one by one."""
        return find_transformer_blocks(self)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks' activations in the backward pass: less memory, the same loss."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


def _build_decoder_block(cfg: DecoderConfig) -> DecoderBlock:
    norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    return DecoderBlock(
        cfg.width,
        cfg.heads,
        mlp_ratio=cfg.mlp_ratio,
        qkv_bias=True,
        # timm's annotation asks for a class, but any callable from width to norm works.
        norm_layer=norm,  # pyright: ignore[reportArgumentType]
        attn_layer=SelfAttention,
    )


def _build_predictor(width: int) -> nn.Sequential:
    """Return the predictor between a token and its target representation (BYOL, 2020), without BatchNorm."""
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    init_linear_layers(layers)
    return layers
