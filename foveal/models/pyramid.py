"""Maps of several resolutions from the one that a plain transformer has.

B images, D width of what comes in, W width of what goes out, rows by columns of places.
"""

import math
from collections.abc import Sequence

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

DEFAULT_STRIDES = (4, 8, 16, 32)  # pixels between places of the maps of a hierarchical network


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Li et al., "Exploring plain vision transformer backbones", 2022, section 3).

    Every map is made of the last map alone: finer ones by transposed convolutions, coarser ones by taking the largest,
    then a 1 x 1 and a 3 x 3 convolution to ``width``. Norms are over channels, so that no image depends on another.
    ``strides`` are those of its maps in pixels: powers of two times that of the map that comes in (a patch of 14 pixels
    has 3.5, 7, 14 and 28). The weights are drawn from torch's global generator.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_stride: int, out_strides: Sequence[int] = DEFAULT_STRIDES
    ) -> None:
        """``inside`` and ``stride`` (pixels) are of the map that comes in, ``strides`` what is wanted."""
        super().__init__()
        finer = [
            round(math.log2(in_stride / wanted)) for wanted in out_strides
        ]  # times twice as fine; below 0: coarser
        self.strides = tuple(in_stride / 2**times for times in finer)
        self.levels = nn.ModuleList(_PyramidLevel(in_channels, out_channels, times) for times in finer)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, W, rows, columns] of a map [B, D, rows, columns], the finest first.

        A coarser map of an odd number of rows rounds up: its last place stands for what is left.
        """
        return tuple(level(feature_map) for level in self.levels)


class _PyramidLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, log2_scale: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for time in range(log2_scale):
            steps += [LayerNorm2d(in_channels), nn.GELU()] if time else []
            steps.append(nn.ConvTranspose2d(in_channels, max(1, in_channels // 2), kernel_size=2, stride=2))
            in_channels = max(1, in_channels // 2)
        if log2_scale < 0:
            steps.append(nn.MaxPool2d(2**-log2_scale, ceil_mode=True))
        self.scale = nn.Sequential(*steps)
        self.lateral = nn.Conv2d(in_channels, out_channels, 1, bias=False)  # the norm behind it has one
        self.lateral_norm = LayerNorm2d(out_channels)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.smooth_norm = LayerNorm2d(out_channels)

    def forward(self, feature_map: Tensor) -> Tensor:
        lateral = self.lateral_norm(self.lateral(self.scale(feature_map)))
        return self.smooth_norm(self.smooth(lateral))
