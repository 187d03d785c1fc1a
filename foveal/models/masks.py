"""Which patches are shown: masks in blocks or on a grid, made from the numbers that would mask at random.

A kind of masking turns a row of uniform numbers into noise whose K lowest patches are shown (``patches.split_by_noise``),
so that every kind shows the same number of patches of every image, and none has randomness of its own.
B images, L = rows * columns patches.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveal.errors import ConfigError
from foveal.models.patches import count_visible

MaskStrategy = Literal["random", "block", "grid"]
NUM_OFFSET_DRAWS = 2  # further numbers of a row: how far the blocks or the grid are moved down and across


def random_mask_noise(uniforms: Tensor, rows: int, columns: int, _block_size: int) -> Tensor:
    """Noise [B, L] from numbers [B, L + SHIFTS]: the first L, as they are (He et al., 2022)."""
    return uniforms[:, : rows * columns]


def block_mask_noise(uniforms: Tensor, rows: int, columns: int, block_size: int) -> Tensor:
    """Noise, float64 [B, L], that masks squares of ``side`` x ``side`` patches (figure 6 of He et al., after BEiT, 2022).

    The squares tile the image from a corner that is drawn for each image, and are cut off at its border. They are masked
    whole but for one, of which as many patches are shown as are missing from K.
    """
    noise_BL, shift_B2 = uniforms[:, : rows * columns], (uniforms[:, -NUM_OFFSET_DRAWS:] * block_size).long()
    down_BR, across_BC = (
        (torch.arange(length, device=uniforms.device) + shift_B2[:, axis, None]) // block_size
        for axis, length in enumerate((rows, columns))
    )
    wide = (columns + block_size - 2) // block_size + 1  # the most squares that a row of patches meets
    square_BL = (down_BR[:, :, None] * wide + across_BC[:, None, :]).flatten(1)
    # A square's own number is that of the patch with its index; squares are never more than patches.
    order_BL = noise_BL.argsort(dim=1, stable=True).argsort(dim=1)
    # float64: the square's place in the order before the point, the patch's own 24 bits behind it.
    return order_BL.gather(1, square_BL).double() + noise_BL.double()


def grid_mask_noise(uniforms: Tensor, rows: int, columns: int, block_size: int) -> Tensor:
    """Noise, float64 [B, L], that shows one patch of each cell of ``side`` x ``side`` (figure 6 of He et al., 2022).

    It is the same one in all cells of an image, and another in the next image.
    """
    noise_BL, shift_B2 = uniforms[:, : rows * columns], (uniforms[:, -NUM_OFFSET_DRAWS:] * block_size).long()
    hit_BR, hit_BC = (
        torch.arange(length, device=uniforms.device) % block_size == shift_B2[:, axis, None]
        for axis, length in enumerate((rows, columns))
    )
    hidden_BL = ~(hit_BR[:, :, None] & hit_BC[:, None, :]).flatten(1)
    return hidden_BL.double() + noise_BL.double()


MASK_NOISE_FUNCTIONS: dict[MaskStrategy, Callable[[Tensor, int, int, int], Tensor]] = {
    "random": random_mask_noise,
    "block": block_mask_noise,
    "grid": grid_mask_noise,
}


def resolve_mask_block_size(strategy: MaskStrategy, rows: int, columns: int, mask_ratio: float, block_size: int) -> int:
    """The side, in patches, of what a kind of masking draws: of a block, of a cell of the grid, or of one patch.

    Raises: ConfigError for a ratio that leaves nothing visible or that no such grid has, and for a block larger than the
    image.
    """
    kept = count_visible(rows * columns, mask_ratio)
    if strategy == "block":
        if block_size > min(rows, columns):
            raise ConfigError(
                f"mask_block={block_size} is more than the {rows} x {columns} patches of an image have on a side; at most "
                f"{min(rows, columns)} fits"
            )
        return block_size
    if strategy == "grid":
        return _grid_cell_size(rows, columns, kept, mask_ratio)
    return 1


def _grid_cell_size(rows: int, columns: int, num_visible: int, mask_ratio: float) -> int:
    """The side of the cells of which ``kept`` divide the patches."""
    sides = [side for side in range(2, math.gcd(rows, columns) + 1) if rows % side == 0 and columns % side == 0]
    fitting = {rows * columns // side**2: side for side in sides}
    if num_visible in fitting:
        return fitting[num_visible]
    if not sides:
        raise ConfigError(f"masking=grid cannot divide {rows} x {columns} patches into equal square cells; take random")
    ratios = [1 - 1 / side**2 for side in sides]
    nearest = sorted(sorted(ratios, key=lambda other: abs(other - mask_ratio))[:2])
    # Rounded down, so that what is named is accepted.
    names = " or ".join(f"{math.floor(1e4 * other) / 1e4:g}" for other in nearest)
    raise ConfigError(
        f"mask_ratio={mask_ratio:g} cannot be had with masking=grid, which shows one patch of each square cell of {rows} x "
        f"{columns} patches; the nearest that can: {names}"
    )
