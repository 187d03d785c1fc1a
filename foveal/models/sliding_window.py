"""Sliding-window inference: dense predictions for images larger than the model's.

B images, C channels, H x W pixels of an image, h x w pixels of a window, K classes.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def window_top_lefts(
    image_hw: tuple[int, int], window_hw: tuple[int, int], stride_fraction: float
) -> list[tuple[int, int]]:
    """Return (top, left) of windows that cover an image, row by row; sizes are (height, width).

    The stride is ``stride_fraction`` of a window; the last window of a row or column moves back to end with the image.
    """
    tops, lefts = (
        _window_offsets(image_side, window_side, stride_fraction)
        for image_side, window_side in zip(image_hw, window_hw, strict=True)
    )
    return [(top, left) for top in tops for left in lefts]


def _window_offsets(image_side: int, window_side: int, stride_fraction: float) -> list[int]:
    stride = max(1, round(window_side * stride_fraction))
    last = image_side - window_side
    return [min(number * stride, last) for number in range(math.ceil(last / stride) + 1)]


def iter_sliding_window_log_probs(
    predict_logits: Callable[[Tensor], Tensor], images: Tensor, window_hw: tuple[int, int], stride_fraction: float
) -> Iterator[Tensor]:
    """Yield the log-probabilities [K, H, W] of each of the images [B, C, H, W].

    ``predict_logits`` maps windows [B, C, h, w] to logits [B, K, h, w]. Overlapping windows average their probabilities
    (mmsegmentation's ``slide_inference`` averages logits): the mean is again a distribution, whose logarithm gives a
    loss. A single window gives its log-softmax, bit for bit. Memory holds B windows and one output image at a time.
    """
    batch, image_size = len(images), (images.shape[2], images.shape[3])
    corners = window_top_lefts(image_size, window_hw, stride_fraction)
    windows = [(image, top, left) for image in range(batch) for top, left in corners]
    log_sum, counts = images.new_empty(0), images.new_empty(0)
    for begin in range(0, len(windows), batch):
        chunk = windows[begin : begin + batch]
        crops = torch.stack([images[image, :, *_window_slices(top, left, window_hw)] for image, top, left in chunk])
        for (_, top, left), log_probs in zip(chunk, F.log_softmax(predict_logits(crops).float(), dim=1), strict=True):
            area = _window_slices(top, left, window_hw)
            if (top, left) == corners[0]:
                log_sum = log_probs.new_full((len(log_probs), *image_size), -math.inf)
                counts = log_probs.new_zeros(image_size)
            log_sum[:, *area] = torch.logaddexp(log_sum[:, *area], log_probs)
            counts[area] += 1
            if (top, left) == corners[-1]:
                yield log_sum - counts.log()


def _window_slices(top: int, left: int, window_size: tuple[int, int]) -> tuple[slice, slice]:
    return slice(top, top + window_size[0]), slice(left, left + window_size[1])
