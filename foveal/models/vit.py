"""Encoders: timm's vision transformers, sized by a config and initialised as in the MAE paper.

The module is timm's own, so its parameter names are the weight format between stages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, init_random_2d_freqs
from timm.layers.weight_init import trunc_normal_  # torch's own draws differ between versions
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from foveal.config import ImageSize, height_and_width, science
from foveal.errors import ConfigError, ExportError
from foveal.models.attention import SelfAttention
from foveal.models.config import Pooling, Positions, ResolvedVitConfig, VitConfig
from foveal.models.droppath import replace_drop_paths
from foveal.models.sincos import check_sincos_width, sincos_positions
from foveal.models.timm_vit import (
    Encoder,
    build_meta_encoder,
    get_class_specific_kwargs,
    get_encoder_sizes,
    has_absolute_positions,
    has_plain_attention,
    has_rotary_positions,
)
from foveal.models.token_positions import replace_relative_biases

HEAD_INIT_STD = 2e-5  # a new head's logits start near 0, as in the reference fine-tuning of MAE
TOKEN_INIT_STD = 0.02


class EncoderCard(ResolvedVitConfig):
    """The sizes, image format and head from which an encoder is rebuilt."""

    image_size: ImageSize = science(description="Image size in pixels: the side, or [height, width].")
    channels: int = science(description="Image channels.", ge=1)
    pooling: Pooling = science("token", "Input of the head: the class token, or the mean of the patches.")
    classes: int = science(0, "Outputs of the head; 0: no head.", ge=0)

    def trained_size_if_different(self, image_size: int | tuple[int, int]) -> int | tuple[int, int] | None:
        """Return the card's image size if it differs from ``image_size``, else None.

        Raises: ConfigError if ``image_size`` is not a whole number of patches.
        """
        resolve_sizes_for_image(self, image_size)
        return None if self.image_size == image_size else self.image_size


def resolve_sizes(cfg: VitConfig) -> ResolvedVitConfig:
    """Return the same config with every size filled in.

    Raises: ConfigError if timm has no such transformer, or if ``positions`` does not suit it.
    """
    encoder = build_meta_encoder(cfg.name)
    _check_position_kind(cfg, encoder)
    sizes = get_encoder_sizes(encoder)
    sizes.update((name, value) for name, value in cfg if value is not None or name == "positions")
    return ResolvedVitConfig.model_validate({name: sizes[name] for name in VitConfig.model_fields})


def resolve_sizes_for_image(cfg: VitConfig, image_size: int | tuple[int, int]) -> ResolvedVitConfig:
    """Return ``resolve_sizes``, checked against an image of this side, or (height, width).

    Raises: ConfigError, as ``resolve_sizes``, or if the sizes do not fit each other or the image.
    """
    sizes = resolve_sizes(cfg)
    _check_sizes(sizes, image_size)
    return sizes


def build_encoder(
    cfg: VitConfig,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    drop_path: float = 0.0,
    pooling: Pooling = "token",
    num_classes: int = 0,
) -> Encoder:
    """Build a timm vision transformer on the CPU in float32, without dropout, initialised as in He et al., 2022 (A.1).

    The forward maps images [B, channels, *image_size] to logits [B, num_classes], or without classes to pooled features
    [B, width]. The drop path rate grows linearly over the blocks up to ``drop_path``; its noise comes from
    ``foveal.models.droppath.set_drop_path_noise``. Weights are drawn from torch's global generator in foveal's own
    order: ``torch.manual_seed`` before this call makes them a function of the seed.

    Raises: ConfigError if timm has no such vision transformer, or if the sizes do not fit each other.
    """
    sizes = resolve_sizes_for_image(cfg, image_size)
    args = timm_encoder_args(sizes, image_size, channels, pooling=pooling, num_classes=num_classes)
    if has_plain_attention(build_meta_encoder(sizes.name)):
        args["attn_layer"] = SelfAttention
    # timm draws too, and its number of draws may change with its version: restore the generator before foveal draws.
    with torch.random.fork_rng(devices=[]):
        encoder: Any = timm.create_model(sizes.name, pretrained=False, drop_path_rate=drop_path, **args)
        replace_relative_biases(encoder)
    _init_encoder(encoder, sizes.positions)
    replace_drop_paths(encoder)
    return encoder


def timm_encoder_args(
    sizes: ResolvedVitConfig,
    image_size: int | tuple[int, int],
    channels: int,
    *,
    pooling: Pooling,
    num_classes: int,
) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model``, beside the name, for the encoder of these sizes; JSON holds them."""
    return {
        "img_size": height_and_width(image_size),
        "in_chans": channels,
        "num_classes": num_classes,
        "global_pool": pooling,
        "patch_size": sizes.patch,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "mlp_ratio": sizes.mlp_ratio,
        **get_class_specific_kwargs(build_meta_encoder(sizes.name), pooling, sizes.registers),
    }


def encoder_card(
    cfg: VitConfig,
    image_size: int | tuple[int, int],
    channels: int,
    *,
    pooling: Pooling = "token",
    num_classes: int = 0,
) -> dict[str, Any]:
    """Return the JSON-ready card from which ``encoder_from_card`` builds the same encoder in any later version.

    Raises: ConfigError, as ``build_encoder``.
    """
    sizes = resolve_sizes_for_image(cfg, image_size).to_dict()
    card = EncoderCard(**sizes, image_size=image_size, channels=channels, pooling=pooling, classes=num_classes)
    return card.to_dict()


def encoder_from_card(
    card: dict[str, Any],
    source: str,
    *,
    drop_path: float = 0.0,
    pooling: Pooling | None = None,
    num_classes: int | None = None,
) -> Encoder:
    """Build the encoder that a card describes, freshly initialised; ``pooling`` and ``num_classes`` override the card.

    ``source`` names the card's file in error messages. Raises: ExportError if the card is invalid.
    """
    with config_error_as_export(source):
        parsed_card = EncoderCard.from_dict(card, source)
        return build_encoder(
            parsed_card,
            image_size=parsed_card.image_size,
            channels=parsed_card.channels,
            drop_path=drop_path,
            pooling=parsed_card.pooling if pooling is None else pooling,
            num_classes=parsed_card.classes if num_classes is None else num_classes,
        )


@contextmanager
def config_error_as_export(source: str) -> Iterator[None]:
    """Raise a ConfigError as an ExportError whose message starts with ``source``, the name of a card's file."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        raise ExportError(message if message.startswith(source) else f"{source}: {message}") from None


def init_linear_layers(module: nn.Module) -> None:
    """Draw Xavier-uniform weights and set zero biases in every linear layer inside a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check_sizes(sizes: ResolvedVitConfig, image_size: int | tuple[int, int]) -> None:
    sides = height_and_width(image_size)
    if any(side % sizes.patch for side in sides):
        nearest = [sizes.patch * max(1, round(side / sizes.patch)) for side in sides]
        current, suggestion = (image_size, nearest[0]) if isinstance(image_size, int) else (list(image_size), nearest)
        raise ConfigError(
            f"image_size={current} is not a whole number of patches of {sizes.patch} pixels; the nearest that is: "
            f"{suggestion}"
        )
    if sizes.width % sizes.heads:
        divisors = [heads for heads in range(1, sizes.width + 1) if sizes.width % heads == 0]
        nearest = min(divisors, key=lambda heads: abs(heads - sizes.heads))
        raise ConfigError(f"width={sizes.width} cannot be divided among heads={sizes.heads}; heads={nearest} fits")
    if sizes.positions == "sincos":
        check_sincos_width(sizes.width)
    if sizes.registers and isinstance(build_meta_encoder(sizes.name), VisionTransformerRelPos):
        raise ConfigError(
            f"'{sizes.name}' has a relative bias, and timm gives such an encoder no registers: set registers=0"
        )
    if has_rotary_positions(build_meta_encoder(sizes.name)) and sizes.width // sizes.heads % 4:
        raise ConfigError(
            f"width={sizes.width} over heads={sizes.heads} gives {sizes.width // sizes.heads} values per head, but the "
            f"rotary positions of '{sizes.name}' need a multiple of 4"
        )


def _check_position_kind(cfg: VitConfig, encoder: Any) -> None:
    if has_absolute_positions(encoder) and cfg.positions is None:
        raise ConfigError(f"'{cfg.name}' adds positions to its patches: positions must be sincos or learned, not null")
    if not has_absolute_positions(encoder) and cfg.positions is not None:
        kind = "rotary" if has_rotary_positions(encoder) else "a relative bias"
        raise ConfigError(
            f"'{cfg.name}' adds no positions to its patches (they are {kind}): set positions=null instead of "
            f"positions={cfg.positions}"
        )


def _init_encoder(encoder: Any, positions: Positions | None) -> None:
    init_linear_layers(encoder)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    if encoder.patch_embed.proj.bias is not None:
        nn.init.zeros_(encoder.patch_embed.proj.bias)
    nn.init.normal_(encoder.cls_token, std=TOKEN_INIT_STD)
    if getattr(encoder, "reg_token", None) is not None:
        nn.init.normal_(encoder.reg_token, std=TOKEN_INIT_STD)
    if isinstance(encoder.head, nn.Linear):
        trunc_normal_(encoder.head.weight, std=HEAD_INIT_STD)
    if has_rotary_positions(encoder) and isinstance(encoder.rope, RotaryEmbeddingMixed):
        rope, head_width = encoder.rope, encoder.embed_dim // encoder.rope.num_heads
        with torch.no_grad():
            rope.freqs.copy_(init_random_2d_freqs(head_width, rope.depth, rope.num_heads, temperature=rope.temperature))
    if positions == "learned":
        trunc_normal_(encoder.pos_embed, std=TOKEN_INIT_STD)
    if positions == "sincos":
        rows, columns = encoder.patch_embed.grid_size
        with torch.no_grad():
            encoder.pos_embed.zero_()  # a class token's row stays 0
            encoder.pos_embed[0, -rows * columns :] = sincos_positions(rows, columns, encoder.embed_dim)
        encoder.pos_embed.requires_grad_(False)
