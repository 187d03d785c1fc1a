"""Feature maps of several resolutions from the single map of a plain transformer.

B images, D input channels, W output channels.
"""

import math
from collections.abc import Sequence

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

DEFAULT_STRIDES = (4, 8, 16, 32)  # pixels; those of a hierarchical network's maps


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Li et al., "Exploring plain vision transformer backbones", 2022, section 3).

    Every output map is computed from the input map only: transposed convolutions make finer maps, max pooling coarser
    ones, then a 1 x 1 and a 3 x 3 convolution give ``out_channels``. Norms are over channels, so that no image depends
    on another. ``strides`` are those of the output maps in pixels: powers of two times the input map's (patches of 14
    pixels give 3.5, 7, 14 and 28). Weights are drawn from torch's global generator.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_stride: int, out_strides: Sequence[int] = DEFAULT_STRIDES
    ) -> None:
        """``out_strides`` (pixels) are rounded to powers of two times ``in_stride``."""
        super().__init__()
        # Doublings of the resolution; negative: halvings.
        log2_scales = [round(math.log2(in_stride / out_stride)) for out_stride in out_strides]
        self.strides = tuple(in_stride / 2**log2_scale for log2_scale in log2_scales)
        self.levels = nn.ModuleList(_PyramidLevel(in_channels, out_channels, log2_scale) for log2_scale in log2_scales)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, W, rows, columns] of a map [B, D, rows, columns], in the order of ``strides``.

        Coarser maps round odd sizes up: their last row or column pools what remains.
        """
        return tuple(level(feature_map) for level in self.levels)


class _PyramidLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, log2_scale: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for doubling in range(log2_scale):
            layers += [LayerNorm2d(in_channels), nn.GELU()] if doubling else []
            layers.append(nn.ConvTranspose2d(in_channels, max(1, in_channels // 2), kernel_size=2, stride=2))
            in_channels = max(1, in_channels // 2)
        if log2_scale < 0:
            layers.append(nn.MaxPool2d(2**-log2_scale, ceil_mode=True))
        self.scale = nn.Sequential(*layers)
        self.lateral = nn.Conv2d(in_channels, out_channels, 1, bias=False)  # the following norm has a bias
        self.lateral_norm = LayerNorm2d(out_channels)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.smooth_norm = LayerNorm2d(out_channels)

    def forward(self, feature_map: Tensor) -> Tensor:
        lateral = self.lateral_norm(self.lateral(self.scale(feature_map)))
        return self.smooth_norm(self.smooth(lateral))
