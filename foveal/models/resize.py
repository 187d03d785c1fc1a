"""Maps and weights for another grid of places: weights for other patches, exactly as timm would load them there."""

import math
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from foveal.models.timm_vit import Encoder
from foveal.models.vit import EncoderCard, Positions


def resize_weights_from_card(
    weights: dict[str, Tensor], encoder: Encoder, card: dict[str, Any], where: str
) -> dict[str, Tensor]:
    """The weights that an encoder's card (read from ``where``) belongs to, for the grid of ``encoder``."""
    told = EncoderCard.from_dict(card, where)
    return resize_weights(weights, encoder, told.positions, told.patch_grid(told.image_size))


def resize_weights(
    weights: dict[str, Tensor], encoder: Encoder, positions: Positions | None, source_grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Weights that were trained on a grid (rows, columns) with these positions, for the grid of ``encoder``.

    Learned positions are resampled (bicubic, antialiased), the rows of a class token and registers stay; sines and cosines are those
    of the new grid, which the encoder has. Rotary positions and relative biases are functions of places: nothing of
    them is resized.
    """
    embed: Any = encoder.patch_embed
    table, length = weights.get("pos_embed"), math.prod(source_grid)
    # A table that is not of this grid is left as it is: loading it strictly says so.
    if table is None or source_grid == embed.grid_size or table.shape[1] - length not in (0, encoder.num_prefix_tokens):
        return weights
    if positions == "sincos":
        return weights | {"pos_embed": encoder.get_parameter("pos_embed").detach()}
    return weights | {
        "pos_embed": resample_abs_pos_embed(table, embed.grid_size, [*source_grid], table.shape[1] - length)
    }


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, D, rows, columns] at other sides, bilinearly as ``F.interpolate`` without aligned corners.

    As two products: on a GPU the backward of torch's own adds in another order each time.
    """
    if maps.shape[2:] == size:
        return maps
    down, across = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, mode="linear")[0].to(maps.dtype)
        for old, new in zip(maps.shape[2:], size, strict=True)
    )
    return ((maps @ across).transpose(2, 3) @ down).transpose(2, 3)
