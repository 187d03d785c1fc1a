"""Fixed two-dimensional sine-cosine positions (He et al., "Masked Autoencoders", 2022, after Vaswani et al., 2017)."""

import torch
from torch import Tensor

from foveal.errors import ConfigError

TEMPERATURE = 10000.0


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return the positions of a patch grid, float32 [rows * columns, width], row by row.

    The first half of the width codes the column, the second half the row, each as sines then cosines of
    position / 10000^(2i / (width / 2)). The column comes first because it does in published MAE weights.
    Raises: ConfigError if 4 does not divide the width.
    """
    check_sincos_width(width)
    quarter = width // 4
    # float64: in float32 the phases of a large grid differ from other libraries' by more than the tests allow.
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    row_positions, column_positions = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    phases = [positions.flatten()[:, None] * frequencies for positions in (column_positions, row_positions)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1).float()


def check_sincos_width(width: int) -> None:
    """Raises: ConfigError if 4 does not divide the width; the message names the nearest multiple."""
    if width % 4:
        nearest = max(4, 4 * round(width / 4))
        raise ConfigError(f"width={width}: sine-cosine positions need a multiple of 4; the nearest is {nearest}")
