"""The patch grid of a stored position table, whose length alone does not tell rows from columns."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ExportError
from foveal.models.sincos import sincos_positions

_TOLERANCE = 1e-4  # maximum distance of a stored sine-cosine table from the formula


def infer_patch_grid(
    table: Tensor,
    num_prefix_rows: int,
    patch: int,
    data_grid: tuple[int, int],
    stated_sizes: Iterable[tuple[int, int]],
    source: Path,
) -> tuple[int, int]:
    """Return (rows, columns) of a position table [1, prefix rows + patches, D].

    The first of these that has as many patches: an image size (height, width) of ``stated_sizes``, a grid whose
    sine-cosine formula the table is, a square (as published weights are) or ``data_grid``.
    Raises: ExportError if none has, or if the square and another ``data_grid`` both have.
    """
    length = table.shape[1] - num_prefix_rows
    for height, width in stated_sizes:
        if height % patch == 0 and width % patch == 0 and (height // patch) * (width // patch) == length:
            return height // patch, width // patch
    side = math.isqrt(max(length, 0))
    if math.prod(data_grid) == length and (side**2 != length or is_sincos_table(table, data_grid)):
        return data_grid
    if math.prod(data_grid) == length and data_grid != (side, side) and not is_sincos_table(table, (side, side)):
        raise ambiguous_size_error(source, (side * patch, side * patch), (data_grid[0] * patch, data_grid[1] * patch))
    if side**2 != length or not side:
        raise ExportError(
            f"{source} has positions of {length} patches, which are neither {data_grid[0]} x {data_grid[1]} nor a "
            f"square; state image_size: [height, width] in a config.json beside them"
        )
    return side, side


def ambiguous_size_error(source: Path, square: tuple[int, int], data_size: tuple[int, int]) -> ExportError:
    """Return the refusal of positions that fit two image sizes (height, width), neither of which is stated."""
    sizes = (f"{height} x {width}" for height, width in (square, data_size))
    return ExportError(
        f"{source} has positions that fit images of {' and of '.join(sizes)} pixels (data.image_size), and nothing says "
        f'which they are of; state "image_size": {list(square)} or {list(data_size)} in a config.json beside them'
    )


def is_sincos_table(table: Tensor, grid: tuple[int, int]) -> bool:
    """Return whether the patches' rows of a table [1, P + L, D] are the sine-cosine positions of a grid."""
    patches = table[0, -math.prod(grid) :]
    if patches.shape[0] != math.prod(grid) or patches.shape[1] % 4:
        return False
    expected = sincos_positions(*grid, patches.shape[1])
    return bool(torch.lt((patches - expected).abs().max(), _TOLERANCE))
