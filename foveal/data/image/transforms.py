"""Which part of an image is seen, and how uint8 pixels become normalised floats on the device.

Every random choice is an argument: one row of uniform numbers per sample, with a fixed column for each purpose.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from foveal.data.config import AugmentConfig

CropBox = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop, so that crops have its distribution
_FLIP, _LEFT, _TOP, _SHAPES = 0, 1, 2, 3
UNIFORMS_PER_CROP = _SHAPES + 2 * _ATTEMPTS  # uniform numbers that one training image takes


def compute_train_crop(
    width: int, height: int, uniforms: np.ndarray, augment: AugmentConfig, output_hw: tuple[int, int] = (1, 1)
) -> tuple[CropBox, bool]:
    """The crop, and whether it is flipped, for an image of width x height pixels; ``numbers`` is float32 [COLUMNS].

    The first of ten drawn shapes that fits is placed uniformly; if none does, the largest centre crop whose ratio is
    allowed is taken. A ratio is width over height, over that of ``sides`` (height, width) to which the crop is resized:
    1 leaves shapes as they are. scale = ratio = (1, 1) is the largest centre crop that does.
    """
    flipped = bool(uniforms[_FLIP] < augment.flip)
    narrowest, widest = (bound * (output_hw[1] / output_hw[0]) for bound in augment.ratio)
    low, high = math.log(narrowest), math.log(widest)
    # An image that is a pixel off the shape would be cut by chance where nothing else is.
    for attempt in range(0 if augment.is_max_center_crop else _ATTEMPTS):
        scale, ratio = (float(number) for number in uniforms[_SHAPES + 2 * attempt : _SHAPES + 2 * attempt + 2])
        area = width * height * (augment.scale[0] + scale * (augment.scale[1] - augment.scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(float(uniforms[_LEFT]) * (width - across + 1))
            top = int(float(uniforms[_TOP]) * (height - down + 1))
            return (left, top, left + across, top + down), flipped
    aspect = min(max(width / height, narrowest), widest)
    across = min(width, max(1, round(height * aspect)))
    down = min(height, max(1, round(width / aspect)))
    left, top = (width - across) // 2, (height - down) // 2
    return (left, top, left + across, top + down), flipped


def compute_eval_crop(width: int, height: int, crop_ratio: float, output_hw: tuple[int, int] = (1, 1)) -> CropBox:
    """The centre box of the shape of ``sides`` (height, width) that is crop_ratio times as wide as the largest one.

    For a square that is crop_ratio times the shorter side. Resizing it to image_size is what resizing the shorter side
    to image_size / crop_ratio and cropping the centre does, where the box is rounded to whole pixels instead of the size
    in between (see ``pixels``).
    """
    aspect = output_hw[1] / output_hw[0]
    down = min(height, width / aspect) * crop_ratio
    across = down * aspect
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, C, H, W] to float32 with mean 0 and deviation 1 where ``mean`` and ``std`` (pixels in [0, 1]) hold.

    Runs where the images are: a quarter of the bytes cross the bus. One value serves all channels.
    """
    factor, offset = _scale_and_offset(tuple(mean), tuple(std), images.device)
    # In place, of a copy: fresh memory for every step of it takes longer than the arithmetic.
    return images.to(torch.float32, copy=True).mul_(factor).add_(offset)


@functools.lru_cache(maxsize=8)
def _scale_and_offset(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """255 and the statistics as one multiplication and one addition, kept on the device: no copy in every step."""
    with unset_fake_temporarily():  # a plan traces a step on fake tensors; kept, they would make this do nothing
        average, deviation = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        return (1 / (255 * deviation)).float().to(device), (-average / deviation).float().to(device)
