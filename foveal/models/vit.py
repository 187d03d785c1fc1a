"""Encoders: timm's vision transformers, sized by a config and initialised as in the MAE paper.

The module is timm's own, so its parameter names are the format in which stages hand weights to each other.
"""

from typing import Any, Literal

import timm
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, init_random_2d_freqs
from timm.layers.weight_init import trunc_normal_  # torch draws another sequence in another version
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from foveal.config import Config, ImageSize, height_and_width, science
from foveal.errors import ConfigError, ExportError
from foveal.models.droppath import replace_drop_paths
from foveal.models.sincos import check_sincos_width, sincos_positions
from foveal.models.timm_vit import (
    Encoder,
    build_meta_encoder,
    get_encoder_sizes,
    get_timm_kwargs,
    has_absolute_positions,
    has_rotary_positions,
)
from foveal.models.token_positions import replace_relative_biases

Pooling = Literal["token", "avg"]
Positions = Literal["sincos", "learned"]
HEAD_INIT_STD = 2e-5  # a new classifier starts nearly indifferent, as in the reference fine-tuning of MAE
TOKEN_INIT_STD = 0.02


class VitConfig(Config):
    """A vision transformer of timm, by name; what is given beside the name overrides it."""

    name: str = science("vit_base_patch16_224", "timm name of a plain, rotary or relative vision transformer")
    patch: int | None = science(None, "patch side in pixels", ge=1)
    width: int | None = science(None, "numbers per token", ge=1)
    depth: int | None = science(None, "blocks", ge=1)
    heads: int | None = science(None, "attention heads", ge=1)
    mlp_ratio: float | None = science(None, "hidden width of a block's MLP over the token width", gt=0)
    registers: int | None = science(None, "further tokens that see all patches and are thrown away", ge=0)
    positions: Positions | None = science(
        "sincos",
        "what is added to patches: fixed sine-cosine positions, or learned ones; null where the name adds none",
    )

    def resolve(self) -> "ResolvedVitConfig":
        """The same encoder with every size spelled out.

        Raises: ConfigError when timm has no such transformer, or one whose positions are of another kind.
        """
        encoder = build_meta_encoder(self.name)
        _check_position_kind(self, encoder)
        sizes = get_encoder_sizes(encoder)
        sizes.update((name, value) for name, value in self if value is not None or name == "positions")
        return ResolvedVitConfig.model_validate({name: sizes[name] for name in VitConfig.model_fields})

    def resolve_for_image(self, image_size: int | tuple[int, int]) -> "ResolvedVitConfig":
        """As ``resolved``, and the sizes fit each other and an image of this side, or (height, width). Raises: ConfigError."""
        sizes = self.resolve()
        _check_sizes(sizes, image_size)
        return sizes


class ResolvedVitConfig(VitConfig):
    """A ``VitConfig`` that leaves nothing to timm's name."""

    patch: int = science(description="patch side in pixels", ge=1)
    width: int = science(description="numbers per token", ge=1)
    depth: int = science(description="blocks", ge=1)
    heads: int = science(description="attention heads", ge=1)
    mlp_ratio: float = science(description="hidden width of a block's MLP over the token width", gt=0)
    registers: int = science(0, "further tokens that see all patches and are thrown away", ge=0)

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of an image."""
        height, width = height_and_width(image_size)
        return height // self.patch, width // self.patch


class EncoderCard(ResolvedVitConfig):
    """What it takes to build an encoder again: its sizes, the images it reads, and its head."""

    image_size: ImageSize = science(description="pixels of its images: the side, or [height, width]")
    channels: int = science(description="channels of its images", ge=1)
    pooling: Pooling = science("token", "what its head reads: the class token, or the mean of the patches")
    classes: int = science(0, "outputs of its head; 0: it has none", ge=0)

    def trained_size_if_different(self, image_size: int | tuple[int, int]) -> int | tuple[int, int] | None:
        """The size of its images, if images of ``image_size`` are another and still whole patches, else nothing.

        Raises: ConfigError for a size that is no whole number of patches.
        """
        self.resolve_for_image(image_size)
        return None if self.image_size == image_size else self.image_size


def build_encoder(
    cfg: VitConfig,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    drop_path: float = 0.0,
    pooling: Pooling = "token",
    num_classes: int = 0,
) -> Encoder:
    """A timm vision transformer on the CPU in float32, without dropout, initialised as in He et al., 2022 (appendix A.1).

    Its forward takes images [B, channels, *image_size] to logits [B, classes], or without classes to the
    pooled features [B, width]. Drop path grows linearly over the blocks up to ``drop_path`` and takes its draws from
    ``foveal.models.droppath.set_drops``. The weights are drawn from torch's global generator, in an order that is
    foveal's own: ``torch.manual_seed`` before this call makes them a function of the seed.

    Raises: ConfigError for a name that timm does not have or that is no such vision transformer, and for sizes that do
    not fit each other.
    """
    sizes = cfg.resolve_for_image(image_size)
    # timm draws too, and how much may change with its version: the generator is put back before foveal draws.
    with torch.random.fork_rng(devices=[]):
        encoder: Any = timm.create_model(
            sizes.name,
            pretrained=False,
            img_size=height_and_width(image_size),
            in_chans=channels,
            num_classes=num_classes,
            global_pool=pooling,
            drop_path_rate=drop_path,
            patch_size=sizes.patch,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            **get_timm_kwargs(build_meta_encoder(sizes.name), pooling, sizes.registers),
        )
        replace_relative_biases(encoder)
    _init_encoder(encoder, sizes.positions)
    replace_drop_paths(encoder)
    return encoder


def encoder_card(
    cfg: VitConfig,
    image_size: int | tuple[int, int],
    channels: int,
    *,
    pooling: Pooling = "token",
    num_classes: int = 0,
) -> dict[str, Any]:
    """Plain data, ready for JSON, from which ``encoder_from_card`` builds the same encoder in any later version.

    Raises: ConfigError, as ``build_encoder``.
    """
    sizes = cfg.resolve_for_image(image_size).to_dict()
    card = EncoderCard(**sizes, image_size=image_size, channels=channels, pooling=pooling, classes=num_classes)
    return card.to_dict()


def encoder_from_card(
    card: dict[str, Any],
    where: str,
    *,
    drop_path: float = 0.0,
    pooling: Pooling | None = None,
    num_classes: int | None = None,
) -> Encoder:
    """An encoder like the one a card was made for, freshly initialised; pooling and classes may be others.

    ``where`` names the card's file in the sentence of a mistake. Raises: ExportError.
    """
    try:
        told = EncoderCard.from_dict(card, where)
        return build_encoder(
            told,
            image_size=told.image_size,
            channels=told.channels,
            drop_path=drop_path,
            pooling=told.pooling if pooling is None else pooling,
            num_classes=told.classes if num_classes is None else num_classes,
        )
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def init_linear_layers(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check_sizes(sizes: ResolvedVitConfig, image_size: int | tuple[int, int]) -> None:
    sides = height_and_width(image_size)
    if any(side % sizes.patch for side in sides):
        nearest = [sizes.patch * max(1, round(side / sizes.patch)) for side in sides]
        given, fitting = (image_size, nearest[0]) if isinstance(image_size, int) else (list(image_size), nearest)
        raise ConfigError(
            f"image_size={given} is not a whole number of patches of {sizes.patch} pixels; the nearest that is: {fitting}"
        )
    if sizes.width % sizes.heads:
        fitting = [heads for heads in range(1, sizes.width + 1) if sizes.width % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - sizes.heads))
        raise ConfigError(f"width={sizes.width} cannot be divided among heads={sizes.heads}; heads={nearest} fits")
    if sizes.positions == "sincos":
        check_sincos_width(sizes.width)
    if sizes.registers and isinstance(build_meta_encoder(sizes.name), VisionTransformerRelPos):
        raise ConfigError(
            f"'{sizes.name}' has a relative bias, and timm gives such an encoder no registers: registers=0"
        )
    if has_rotary_positions(build_meta_encoder(sizes.name)) and sizes.width // sizes.heads % 4:
        raise ConfigError(
            f"width={sizes.width} over heads={sizes.heads} leaves {sizes.width // sizes.heads} numbers to a head, and "
            f"'{sizes.name}' turns them by its rotary positions four at a time: take a multiple of 4"
        )


def _check_position_kind(cfg: VitConfig, encoder: Any) -> None:
    if has_absolute_positions(encoder) and cfg.positions is None:
        raise ConfigError(f"'{cfg.name}' adds positions to its patches: positions is sincos or learned, not null")
    if not has_absolute_positions(encoder) and cfg.positions is not None:
        kind = "rotary" if has_rotary_positions(encoder) else "a relative bias"
        raise ConfigError(
            f"'{cfg.name}' adds no positions to its patches (they are {kind}): positions={cfg.positions} cannot be, "
            f"write positions=null"
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
        rope, size = encoder.rope, encoder.embed_dim // encoder.rope.num_heads
        with torch.no_grad():
            rope.freqs.copy_(init_random_2d_freqs(size, rope.depth, rope.num_heads, temperature=rope.temperature))
    if positions == "learned":
        trunc_normal_(encoder.pos_embed, std=TOKEN_INIT_STD)
    if positions == "sincos":
        rows, columns = encoder.patch_embed.grid_size
        with torch.no_grad():
            encoder.pos_embed.zero_()  # and so it stays for a class token
            encoder.pos_embed[0, -rows * columns :] = sincos_positions(rows, columns, encoder.embed_dim)
        encoder.pos_embed.requires_grad_(False)
