"""Mixup and cutmix. Randomness is keyed by sample: the same on any number of ranks and after a resume.

B images of C channels, H x W pixels. Samples are mixed in pairs, rows 2n and 2n + 1 of a microbatch: a pair is in the
same microbatch of the same rank however a step is split, and each epoch's shuffle makes new pairs.
"""

import torch
from torch import Tensor

from foveal.seeding import derive_key, draw_uniform

_MAX_REJECTIONS = 12  # candidate pairs per beta-distributed number; each is accepted with probability >= 1/2


def apply_mixup_cutmix(
    images: Tensor, sample_keys_B: Tensor, seed: int, *, mixup: float, cutmix: float, switch_prob: float
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner; return the images and the fraction of each that is its own, [B] in [0, 1].

    mixup (Zhang et al., 2018): weighted mean, weights from Beta(mixup, mixup). cutmix (Yun et al., 2019): a box of the
    partner's image, whose area fraction is from Beta(cutmix, cutmix), clipped at the edges. If both are on, a sample
    gets cutmix with probability ``switch_prob``. 0 turns either off.
    """
    height, width = images.shape[2:]
    uniform = draw_uniform(derive_key(seed, "mixing"), sample_keys_B, 2 * _MAX_REJECTIONS + 3)
    choice_B, x_B, y_B = uniform[:, :3].T
    cutmix_prob = switch_prob if mixup and cutmix else float(bool(cutmix))
    cut_B = choice_B < cutmix_prob
    own_B = torch.where(cut_B, _sample_beta(uniform[:, 3:], cutmix or 1.0), _sample_beta(uniform[:, 3:], mixup or 1.0))
    side_B = (1 - own_B).sqrt()
    box = make_box_masks(x_B * width, y_B * height, side_B * width, side_B * height, height, width)
    own = torch.where(cut_B.view(-1, 1, 1, 1), 1 - box.float(), own_B.view(-1, 1, 1, 1).expand_as(box))
    return mix_adjacent_pairs(images, own), own.mean(dim=(1, 2, 3))


def mix_adjacent_pairs(values: Tensor, own_fraction: Tensor) -> Tensor:
    """Return ``own_fraction`` [B, ...] of each row of values [B, ...] plus the rest of its partner's row."""
    return own_fraction * values + (1 - own_fraction) * values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def make_box_masks(x_B: Tensor, y_B: Tensor, width_B: Tensor, height_B: Tensor, height: int, width: int) -> Tensor:
    """Return the masks, bool [B, 1, height, width], of boxes around the centres (x, y), in pixels."""
    rows = torch.arange(height, device=x_B.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x_B.device).view(1, 1, 1, -1) + 0.5
    x, y, box_width, box_height = (value_B.view(-1, 1, 1, 1) for value_B in (x_B, y_B, width_B, height_B))
    return ((columns - x).abs() <= box_width / 2) & ((rows - y).abs() <= box_height / 2)


def _sample_beta(uniform: Tensor, alpha: float) -> Tensor:
    """Return a number from Beta(alpha, alpha) for each row of uniform numbers [B, 2 * _MAX_REJECTIONS], alpha <= 1.

    Rejection sampling (Jöhnk, 1964): the first pair whose alpha-th roots sum to at most 1.
    """
    first, second = uniform.pow(1 / alpha).unflatten(1, (_MAX_REJECTIONS, 2)).unbind(dim=2)
    accepted = (first + second <= 1) & (first + second > 0)
    accepted[:, -1] = True  # no pair is accepted in at most 1 of 4,000 rows: the last pair is scaled
    index = accepted.int().argmax(dim=1, keepdim=True)
    first_B, second_B = first.gather(1, index).squeeze(1), second.gather(1, index).squeeze(1)
    return first_B / (first_B + second_B).clamp(min=torch.finfo(torch.float32).tiny)
