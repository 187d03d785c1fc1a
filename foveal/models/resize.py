"""Resize position embeddings and feature maps to another grid; position embeddings exactly as timm resizes them."""

import math
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from foveal.models.config import Positions
from foveal.models.timm_vit import Encoder
from foveal.models.vit import EncoderCard


def resize_positions_from_card(
    weights: dict[str, Tensor], encoder: Encoder, card: dict[str, Any], source: str
) -> dict[str, Tensor]:
    """Return the weights of an encoder with this card (read from ``source``), resized to the grid of ``encoder``."""
    parsed_card = EncoderCard.from_dict(card, source)
    source_grid = parsed_card.patch_grid(parsed_card.image_size)
    return resize_position_embeddings(weights, encoder, parsed_card.positions, source_grid)


def resize_position_embeddings(
    weights: dict[str, Tensor], encoder: Encoder, positions: Positions | None, source_grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Return weights trained on ``source_grid`` (rows, columns), resized to the grid of ``encoder``.

    Learned positions are resampled (bicubic, antialiased), except the rows of the class token and registers.
    Sine-cosine positions are taken from ``encoder``. Rotary positions and relative biases are functions of the patches'
    places and are not resized.
    """
    patch_embed: Any = encoder.patch_embed
    pos_embed, num_patches = weights.get("pos_embed"), math.prod(source_grid)
    # A pos_embed that does not fit ``source_grid`` is returned unchanged: loading it with strict=True then fails.
    if (
        pos_embed is None
        or source_grid == patch_embed.grid_size
        or pos_embed.shape[1] - num_patches not in (0, encoder.num_prefix_tokens)
    ):
        return weights
    if positions == "sincos":
        return weights | {"pos_embed": encoder.get_parameter("pos_embed").detach()}
    return weights | {
        "pos_embed": resample_abs_pos_embed(
            pos_embed, patch_embed.grid_size, [*source_grid], pos_embed.shape[1] - num_patches
        )
    }


def resize_maps(maps: Tensor, target_hw: tuple[int, int]) -> Tensor:
    """Resize maps [B, D, rows, columns] bilinearly, as ``F.interpolate`` without aligned corners.

    Two matrix products replace torch's own operator, whose backward on a GPU has no fixed order of summation.
    """
    if maps.shape[2:] == target_hw:
        return maps
    row_weights, column_weights = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, mode="linear")[0].to(maps.dtype)
        for old, new in zip(maps.shape[2:], target_hw, strict=True)
    )
    return ((maps @ column_weights).transpose(2, 3) @ row_weights).transpose(2, 3)
