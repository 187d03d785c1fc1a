"""Crops of images, and normalisation of uint8 pixels to floats on the device.

Random numbers are arguments: one row of uniform numbers per sample, with a fixed column for each purpose.
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
UNIFORMS_PER_CROP = _SHAPES + 2 * _ATTEMPTS  # uniform numbers per training image


def compute_train_crop(
    width: int, height: int, uniforms: np.ndarray, augment: AugmentConfig, output_hw: tuple[int, int] = (1, 1)
) -> tuple[CropBox, bool]:
    """Return the crop of an image of width x height pixels, and whether it is flipped.

    ``uniforms`` is float32 [UNIFORMS_PER_CROP]. The first of ten drawn shapes that fits is placed uniformly; if none
    fits, the crop is the largest centre crop with an allowed ratio. A ratio is the crop's width over height, divided by
    that of ``output_hw``, the size after resizing: 1 preserves the aspect ratio. scale = ratio = (1, 1) is the largest
    centre crop that preserves it.
    """
    flipped = bool(uniforms[_FLIP] < augment.hflip)
    min_aspect, max_aspect = (bound * (output_hw[1] / output_hw[0]) for bound in augment.ratio)
    low, high = math.log(min_aspect), math.log(max_aspect)
    # The largest centre crop draws no shape: an image one pixel off it would get a random crop, other images none.
    for attempt in range(0 if augment.is_max_center_crop else _ATTEMPTS):
        scale, ratio = (float(number) for number in uniforms[_SHAPES + 2 * attempt : _SHAPES + 2 * attempt + 2])
        area = width * height * (augment.scale[0] + scale * (augment.scale[1] - augment.scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(float(uniforms[_LEFT]) * (width - crop_width + 1))
            top = int(float(uniforms[_TOP]) * (height - crop_height + 1))
            return (left, top, left + crop_width, top + crop_height), flipped
    aspect = min(max(width / height, min_aspect), max_aspect)
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return (left, top, left + crop_width, top + crop_height), flipped


def compute_eval_crop(width: int, height: int, crop_ratio: float, output_hw: tuple[int, int] = (1, 1)) -> CropBox:
    """Return the centre crop with the aspect ratio of ``output_hw`` and crop_ratio times the largest such crop's width.

    A square crop is crop_ratio times the shorter side. Resizing it to image_size equals resizing the shorter side to
    image_size / crop_ratio and cropping the centre, except that ``decode_crop`` rounds the box to integer pixels, and
    the usual order rounds the intermediate size.
    """
    aspect = output_hw[1] / output_hw[0]
    crop_height = min(height, width / aspect) * crop_ratio
    crop_width = crop_height * aspect
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise images [B, C, H, W], uint8, to float32: (images / 255 - mean) / std.

    ``mean`` and ``std`` are per channel, or one value for all channels. The images' device computes: uint8 is a quarter
    of the bytes to transfer.
    """
    factor, offset = _scale_and_offset(tuple(mean), tuple(std), images.device)
    # In place on a copy: allocating memory for each operation takes longer than the arithmetic.
    return images.to(torch.float32, copy=True).mul_(factor).add_(offset)


@functools.lru_cache(maxsize=8)
def _scale_and_offset(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factor and offset of ``normalise`` on the device, cached: no copy in every step."""
    with unset_fake_temporarily():  # `foveal plan` traces on fake tensors; cached, they would disable this
        mean_tensor, std_tensor = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        return (1 / (255 * std_tensor)).float().to(device), (-mean_tensor / std_tensor).float().to(device)
