"""How large the outputs of an encoder's layers are, and how much they differ between images."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Values are counted in bins of equal width in asinh(value / _LINEAR): linear below, logarithmic above, for any range.
_LINEAR, _BINS_PER_UNIT, _HALF = 1e-3, 100, 2200  # _HALF / _BINS_PER_UNIT = asinh(1.8e9): values up to 1.8e6


@dataclass
class ActivationMeter:
    """Sums up the outputs of one layer, image by image."""

    name: str
    mean_squares: list[float] = field(default_factory=list)  # per image
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * _HALF + 1, np.int64))  # of values per bin

    def __post_init__(self) -> None:
        self._sum: Tensor | None = None  # over images, per element

    def add(self, output: Tensor) -> None:
        """Add the output of one image."""
        output = output.float()
        self.mean_squares.append(float(output.square().mean()))
        self._sum = output.clone() if self._sum is None else self._sum + output
        bins = (torch.asinh(output / _LINEAR) * _BINS_PER_UNIT).round().clamp(-_HALF, _HALF).long() + _HALF
        self.counts += torch.bincount(bins.flatten(), minlength=2 * _HALF + 1).cpu().numpy()

    @property
    def rms(self) -> float:
        """Root of the mean square over images, places and channels."""
        return float(np.sqrt(np.mean(self.mean_squares)))

    @property
    def variation(self) -> float | None:
        """Standard deviation over images of a place and channel, in root mean square, divided by ``rms``.

        0: the output is the same for every image. None for one image.
        """
        num_images, mean_square = len(self.mean_squares), float(np.mean(self.mean_squares))
        if num_images < 2 or self._sum is None or not mean_square:
            return None
        constant = float((self._sum / num_images).square().mean())
        variance = max(0.0, mean_square - constant) * num_images / (num_images - 1)
        return float(np.sqrt(variance / mean_square))

    def quantile(self, fraction: float) -> float:
        """Return the value below which this fraction of the values lies, within the width of a bin (1 %)."""
        cumulated = np.cumsum(self.counts)
        return float(bin_values()[np.searchsorted(cumulated, fraction * cumulated[-1])])

    def extent(self) -> tuple[float, float]:
        """Return the smallest and the largest value, within the width of a bin."""
        values = bin_values()[self.counts > 0]
        return float(values[0]), float(values[-1])

    def largest(self) -> float:
        """Return the largest absolute value, within the width of a bin."""
        return max(map(abs, self.extent()))


def bin_values() -> np.ndarray:
    """Return the value in the middle of each bin."""
    return _LINEAR * np.sinh(np.arange(-_HALF, _HALF + 1) / _BINS_PER_UNIT)
