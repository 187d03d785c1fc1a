"""Sliding windows: what a model of small images makes of large ones.

B images, C channels, H x W their pixels, h x w a window's, K classes.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def window_corners(
    image_size: tuple[int, int], window_size: tuple[int, int], stride_fraction: float
) -> list[tuple[int, int]]:
    """(top, left) of windows that cover an image of these sides (height, width), in rows.

    ``share`` of a window lies between two of them; the last of a row or column is moved back to end with the image.
    """
    tops, lefts = (
        [min(number * step, side - length) for number in range(math.ceil((side - length) / step) + 1)]
        for side, length in zip(image_size, window_size, strict=True)
        for step in [max(1, round(length * stride_fraction))]
    )
    return [(top, left) for top in tops for left in lefts]


def iter_sliding_window_log_probs(
    predict_logits: Callable[[Tensor], Tensor], images: Tensor, window_size: tuple[int, int], stride_fraction: float
) -> Iterator[Tensor]:
    """Logarithms of the probabilities [K, H, W] of each of the images [B, C, H, W].

    ``logits_of`` takes windows [B, C, h, w] to logits [B, K, h, w]. Where windows overlap, their probabilities are
    averaged (as those of an ensemble; mmsegmentation's ``slide_inference`` averages logits): the mean is again a
    distribution, and its logarithm a loss. With one window it is that window's softmax, bit for bit. B windows and one
    image are held at a time.
    """
    batch, sides = len(images), (images.shape[2], images.shape[3])
    places = window_corners(sides, window_size, stride_fraction)
    waiting = [(image, top, left) for image in range(batch) for top, left in places]
    total, times = images.new_empty(0), images.new_empty(0)
    for begin in range(0, len(waiting), batch):
        part = waiting[begin : begin + batch]
        cut = torch.stack([images[image, :, *_window_slices(top, left, window_size)] for image, top, left in part])
        for (_, top, left), logits in zip(part, F.log_softmax(predict_logits(cut).float(), dim=1), strict=True):
            area = _window_slices(top, left, window_size)
            if (top, left) == places[0]:
                total = logits.new_full((len(logits), *sides), -math.inf)
                times = logits.new_zeros(sides)
            total[:, *area] = torch.logaddexp(total[:, *area], logits)
            times[area] += 1
            if (top, left) == places[-1]:
                yield total - times.log()


def _window_slices(top: int, left: int, window_size: tuple[int, int]) -> tuple[slice, slice]:
    return slice(top, top + window_size[0]), slice(left, left + window_size[1])
