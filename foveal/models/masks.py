"""Mask strategies (random, block, grid) as noise computed from uniform numbers.

A strategy turns a row of uniform numbers into noise whose K lowest patches stay visible
(``patches.split_patches_by_noise``). So every strategy shows the same number of patches of every image, and none draws
random numbers.
B images, L = rows * columns patches, K visible.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.errors import ConfigError
from foveal.models.config import MaskStrategy
from foveal.models.patches import count_visible

NUM_OFFSET_DRAWS = 2  # further uniform numbers per image: vertical and horizontal offset of the blocks or the grid


def random_mask_noise(uniforms: Tensor, rows: int, columns: int, _block_size: int) -> Tensor:
    """Return noise [B, L]: the first L of the uniform numbers [B, L + NUM_OFFSET_DRAWS] (He et al., 2022)."""
    return uniforms[:, : rows * columns]


def block_mask_noise(uniforms: Tensor, rows: int, columns: int, block_size: int) -> Tensor:
    """Return noise, float64 [B, L], that masks square blocks of patches.

    Figure 6 of He et al., 2022, has the masks of BEiT (2022): rectangles of random size. Here blocks have
    ``block_size`` patches on a side, tile the image from an offset drawn per image and are cut off at the border. Each
    block is masked or visible as a unit, except one, which shows as many patches as are missing from K.
    """
    noise_BL = uniforms[:, : rows * columns]
    offset_B2 = (uniforms[:, -NUM_OFFSET_DRAWS:] * block_size).long()
    block_row_BR, block_column_BC = (
        (torch.arange(length, device=uniforms.device) + offset_B2[:, axis, None]) // block_size
        for axis, length in enumerate((rows, columns))
    )
    max_blocks_per_row = (columns + block_size - 2) // block_size + 1
    block_BL = (block_row_BR[:, :, None] * max_blocks_per_row + block_column_BC[:, None, :]).flatten(1)
    # Block n takes the rank of patch n's noise: there are never more blocks than patches.
    order_BL = noise_BL.argsort(dim=1, stable=True).argsort(dim=1)
    # float64: the block's rank before the decimal point, the 24 bits of the patch's noise behind it.
    return order_BL.gather(1, block_BL).double() + noise_BL.double()


def grid_mask_noise(uniforms: Tensor, rows: int, columns: int, cell_size: int) -> Tensor:
    """Return noise, float64 [B, L], that shows one patch of each square cell (figure 6 of He et al., 2022).

    The visible patch has the same place in all cells of an image; the place is drawn per image.
    """
    noise_BL = uniforms[:, : rows * columns]
    offset_B2 = (uniforms[:, -NUM_OFFSET_DRAWS:] * cell_size).long()
    row_visible_BR, column_visible_BC = (
        torch.arange(length, device=uniforms.device) % cell_size == offset_B2[:, axis, None]
        for axis, length in enumerate((rows, columns))
    )
    hidden_BL = ~(row_visible_BR[:, :, None] & column_visible_BC[:, None, :]).flatten(1)
    return hidden_BL.double() + noise_BL.double()


MASK_NOISE_FUNCTIONS: dict[MaskStrategy, Callable[[Tensor, int, int, int], Tensor]] = {
    "random": random_mask_noise,
    "block": block_mask_noise,
    "grid": grid_mask_noise,
}


def resolve_mask_block_size(strategy: MaskStrategy, rows: int, columns: int, mask_ratio: float, block_size: int) -> int:
    """Return the side, in patches, of a strategy's unit: the block, the grid's cell, or 1 for random masks.

    Raises: ConfigError if the ratio leaves no patch visible or fits no grid, or if a block is larger than the image.
    """
    num_visible = count_visible(rows * columns, mask_ratio)
    if strategy == "block":
        if block_size > min(rows, columns):
            raise ConfigError(
                f"mask_block_size={block_size} is larger than an image of {rows} x {columns} patches; at most "
                f"{min(rows, columns)} fits"
            )
        return block_size
    if strategy == "grid":
        return _grid_cell_size(rows, columns, num_visible, mask_ratio)
    return 1


def _grid_cell_size(rows: int, columns: int, num_visible: int, mask_ratio: float) -> int:
    """Return the side of the cells of which an image has ``num_visible``."""
    sides = [side for side in range(2, math.gcd(rows, columns) + 1) if rows % side == 0 and columns % side == 0]
    side_by_num_cells = {rows * columns // side**2: side for side in sides}
    if num_visible in side_by_num_cells:
        return side_by_num_cells[num_visible]
    if not sides:
        raise ConfigError(
            f"mask_strategy=grid cannot divide {rows} x {columns} patches into equal square cells; use mask_strategy=random"
        )
    ratios = [1 - 1 / side**2 for side in sides]
    nearest = sorted(sorted(ratios, key=lambda ratio: abs(ratio - mask_ratio))[:2])
    # Rounded down: a ratio rounded up could be refused in turn.
    suggestions = " or ".join(f"{math.floor(1e4 * ratio) / 1e4:g}" for ratio in nearest)
    raise ConfigError(
        f"mask_ratio={mask_ratio:g} is impossible with mask_strategy=grid, which shows one patch of each square cell of "
        f"{rows} x {columns} patches; the nearest possible: {suggestions}"
    )
