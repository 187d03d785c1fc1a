"""Random erasing: a box of an image becomes noise. Randomness is keyed by sample, as that of mixup.

B images of C channels, H x W pixels.
"""

import math

import torch
from torch import Tensor

from finetune.config import ErasedBoxes
from finetune.regularizers.mixup import make_box_masks
from foveal.seeding import derive_key, draw_uniform

_AREA_RANGE = (0.02, 1 / 3)  # drawn area as a fraction of the image's (Zhong et al., 2020, and timm)
_ASPECT_RANGE = (0.3, 1 / 0.3)  # drawn aspect ratio in pixels, log-uniform
_MAX_SHAPES = 10  # shapes that timm draws before it leaves the image as it is
_CHANCE, _X, _Y, _SHAPES = 0, 1, 2, 3  # columns of the uniform numbers of ``_draw_inside``


def apply_random_erasing(
    images: Tensor, sample_keys_B: Tensor, seed: int, probability: float, boxes: ErasedBoxes
) -> Tensor:
    """Replace a box of some of the normalised images [B, C, H, W] by standard normal noise per pixel and channel.

    Zhong et al., "Random erasing", 2020, in timm's mode "pixel", as MAE's fine-tuning code has it. ``boxes`` as in
    ``FinetuneConfig.random_erasing_boxes``.
    """
    draw = _draw_inside if boxes == "inside" else _draw_clipped
    box = draw(sample_keys_B, seed, probability, *images.shape[2:])
    return torch.where(box, _sample_normal(sample_keys_B, seed, images.shape).to(images.dtype), images)


def _draw_inside(sample_keys_B: Tensor, seed: int, probability: float, height: int, width: int) -> Tensor:
    """Return masks, bool [B, 1, H, W], of boxes that lie inside the image: the distribution of timm's RandomErasing.

    The first of ten drawn shapes that is smaller than the image is placed uniformly; if none is, nothing is erased.
    """
    uniform = draw_uniform(derive_key(seed, "erasing inside"), sample_keys_B, _SHAPES + 2 * _MAX_SHAPES)
    # float64: the sides are rounded to whole pixels, and devices round logarithms and roots differently.
    area_BN, aspect_BN = _scale_shapes(*uniform[:, _SHAPES:].double().unflatten(1, (_MAX_SHAPES, 2)).unbind(dim=2))
    area_BN = area_BN * height * width
    heights_BN, widths_BN = (area_BN * aspect_BN).sqrt().round(), (area_BN / aspect_BN).sqrt().round()
    fits_BN = (heights_BN < height) & (widths_BN < width)
    first_B1 = fits_BN.int().argmax(dim=1, keepdim=True)
    box_height_B, box_width_B = (sides_BN.gather(1, first_B1).squeeze(1) for sides_BN in (heights_BN, widths_BN))
    top_B = (uniform[:, _Y].double() * (height - box_height_B + 1)).floor()
    left_B = (uniform[:, _X].double() * (width - box_width_B + 1)).floor()
    box = make_box_masks(left_B + box_width_B / 2, top_B + box_height_B / 2, box_width_B, box_height_B, height, width)
    return box & ((uniform[:, _CHANCE] < probability) & fits_BN.any(dim=1)).view(-1, 1, 1, 1)


def _draw_clipped(sample_keys_B: Tensor, seed: int, probability: float, height: int, width: int) -> Tensor:
    """Return masks, bool [B, 1, H, W], of boxes whose centre is uniform in the image; they are cut at its edges."""
    chance_B, area_B, aspect_B, x_B, y_B = draw_uniform(derive_key(seed, "erasing"), sample_keys_B, 5).T
    area_B, aspect_B = _scale_shapes(area_B, aspect_B)
    area_B = area_B * height * width
    box_width_B, box_height_B = (area_B * aspect_B).sqrt(), (area_B / aspect_B).sqrt()
    box = make_box_masks(x_B * width, y_B * height, box_width_B, box_height_B, height, width)
    return box & (chance_B < probability).view(-1, 1, 1, 1)


def _scale_shapes(area: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Return areas (fractions of the image's) and aspect ratios of uniform numbers in [0, 1)."""
    low, high = (math.log(ratio) for ratio in _ASPECT_RANGE)
    return _AREA_RANGE[0] + area * (_AREA_RANGE[1] - _AREA_RANGE[0]), (low + aspect * (high - low)).exp()


def _sample_normal(sample_keys_B: Tensor, seed: int, shape: torch.Size) -> Tensor:
    """Return standard normal numbers of shape [B, ...] (Box and Muller, 1958)."""
    count = math.prod(shape[1:])
    first, second = draw_uniform(derive_key(seed, "erasing noise"), sample_keys_B, 2 * count).split(count, dim=1)
    return ((-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)).view(shape)
