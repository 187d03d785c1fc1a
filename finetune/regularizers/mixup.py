"""Mixup, cutmix and random erasing, whose draws belong to samples: the same on any ranks, and after any resume.

B images of C channels, H x W pixels. A sample's partner is its neighbour, rows 2n and 2n + 1: both lie in one micro of
one rank however a step is dealt out, and an epoch's shuffle makes other pairs each time.
"""

import math

import torch
from torch import Tensor

from foveal.seeding import derive_key, draw_uniform

_MAX_REJECTIONS = 12  # pairs of numbers for a beta-distributed one; each is taken with a probability of at least a half
_AREA_RANGE = (0.02, 1 / 3)  # of an image's area that is erased, and the ratios of the box: as in Zhong et al.
_ASPECT_RANGE = (0.3, 1 / 0.3)


def apply_mixup_cutmix(
    images: Tensor, sample_keys_B: Tensor, seed: int, *, mixup: float, cutmix: float, cutmix_share: float
) -> tuple[Tensor, Tensor]:
    """Each image with a part of its partner, and the share of its own that it keeps, [B] in [0, 1].

    mixup (Zhang et al., 2018): the weighted mean, weights from Beta(mixup, mixup). cutmix (Yun et al., 2019): a box of
    the partner's, whose share of the area is from Beta(cutmix, cutmix), cut off at the edges. Of both, a sample gets the
    second with probability ``cutmix_share``. 0 turns either off.
    """
    height, width = images.shape[2:]
    numbers = draw_uniform(derive_key(seed, "mixing"), sample_keys_B, 2 * _MAX_REJECTIONS + 3)
    which_B, x_B, y_B = numbers[:, :3].T
    share = cutmix_share if mixup and cutmix else float(bool(cutmix))
    cut_B = which_B < share
    own_B = torch.where(cut_B, _sample_beta(numbers[:, 3:], cutmix or 1.0), _sample_beta(numbers[:, 3:], mixup or 1.0))
    side_B = (1 - own_B).sqrt()
    box = _box_masks(x_B * width, y_B * height, side_B * width, side_B * height, height, width)
    own = torch.where(cut_B.view(-1, 1, 1, 1), 1 - box.float(), own_B.view(-1, 1, 1, 1).expand_as(box))
    return mix_with_partners(images, own), own.mean(dim=(1, 2, 3))


def mix_with_partners(values: Tensor, own_fraction: Tensor) -> Tensor:
    """The share ``own`` [B, ...] of each row of values [B, ...], and for the rest its partner's."""
    return own_fraction * values + (1 - own_fraction) * values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def apply_random_erasing(images: Tensor, sample_keys_B: Tensor, seed: int, probability: float) -> Tensor:
    """Images [B, C, H, W], some with a box of Gaussian noise (Zhong et al., "Random erasing", 2020, as MAE's code has it)."""
    height, width = images.shape[2:]
    chance_B, share_B, ratio_B, x_B, y_B = draw_uniform(derive_key(seed, "erasing"), sample_keys_B, 5).T
    area_B = (_AREA_RANGE[0] + share_B * (_AREA_RANGE[1] - _AREA_RANGE[0])) * height * width
    low, high = (math.log(ratio) for ratio in _ASPECT_RANGE)
    aspect_B = (low + ratio_B * (high - low)).exp()
    across_B, down_B = ((area_B * aspect_B).sqrt(), (area_B / aspect_B).sqrt())
    box = _box_masks(x_B * width, y_B * height, across_B, down_B, height, width)
    box = box & (chance_B < probability).view(-1, 1, 1, 1)
    return torch.where(box, _sample_normal(sample_keys_B, seed, images.shape).to(images.dtype), images)


def _box_masks(x_B: Tensor, y_B: Tensor, width_B: Tensor, height_B: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in boxes around centres, bool [B, 1, H, W]."""
    rows = torch.arange(height, device=x_B.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x_B.device).view(1, 1, 1, -1) + 0.5
    x, y, across, down = (each.view(-1, 1, 1, 1) for each in (x_B, y_B, width_B, height_B))
    return ((columns - x).abs() <= across / 2) & ((rows - y).abs() <= down / 2)


def _sample_beta(numbers: Tensor, alpha: float) -> Tensor:
    """One number of Beta(alpha, alpha) a row, for alpha <= 1 (Jöhnk, 1964): the first pair whose roots sum to at most 1."""
    first, second = numbers.pow(1 / alpha).unflatten(1, (_MAX_REJECTIONS, 2)).unbind(dim=2)
    taken = (first + second <= 1) & (first + second > 0)
    taken[:, -1] = True  # of none, one in four thousand: the last pair, scaled
    row = taken.int().argmax(dim=1, keepdim=True)
    first_B, second_B = (each.gather(1, row).squeeze(1) for each in (first, second))
    return first_B / (first_B + second_B).clamp(min=torch.finfo(torch.float32).tiny)


def _sample_normal(sample_keys_B: Tensor, seed: int, shape: torch.Size) -> Tensor:
    """Standard normal numbers of a shape [B, ...] (Box and Muller, 1958)."""
    count = math.prod(shape[1:])
    first, second = draw_uniform(derive_key(seed, "erasing noise"), sample_keys_B, 2 * count).split(count, dim=1)
    return ((-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)).view(shape)
