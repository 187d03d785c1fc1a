"""Fixed two-dimensional sine-cosine positions (He et al., "Masked Autoencoders", 2022, after Vaswani et al., 2017)."""

import torch
from torch import Tensor

from foveal.errors import ConfigError

TEMPERATURE = 10000.0


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Positions of a grid of patches, float32 of shape [rows * columns, width], row by row.

    The first half of the width codes the column and the second the row, each as sines then cosines of
    position / 10000^(2i / (width / 2)). Published MAE weights have the column first, so it is first here.
    Raises: ConfigError for a width that four does not divide.
    """
    check_sincos_width(width)
    quarter = width // 4
    # float64: at float32 the phases of a large grid are off by more than the comparison with other libraries allows.
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    down, across = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    phases = [axis.flatten()[:, None] * frequencies for axis in (across, down)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1).float()


def check_sincos_width(width: int) -> None:
    """Raises: ConfigError for a width that four does not divide, naming the nearest that it does."""
    if width % 4:
        nearest = max(4, 4 * round(width / 4))
        raise ConfigError(f"width={width}: sine-cosine positions need a multiple of 4; the nearest is {nearest}")
