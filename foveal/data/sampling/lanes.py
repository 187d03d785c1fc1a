"""Lanes and batches that fit a training set: the lanes where none are stated, and the numbers that a refusal names."""

import math
from collections.abc import Sequence
from fractions import Fraction

from foveal.errors import ConfigError, DataError

DEFAULT_LANES = 32
_MIN_STEPS = 4  # of an epoch with a batch size that is suggested, where the set allows it


def derive_lanes(batch_size: int, source_sizes: Sequence[int]) -> int:
    """Return the lanes of a training set where data.lanes is null; ranks have no part in it.

    They are 32 wherever 32 fit, else the largest smaller number that fits: it divides the batch into 2 or more images in
    each lane and, of a mixture, is at most the samples of every source.
    """
    limit = min(DEFAULT_LANES, *source_sizes) if len(source_sizes) > 1 else DEFAULT_LANES
    return max((lanes for lanes in fitting_lanes(batch_size) if lanes <= limit), default=1)


def explain_lanes(num_lanes: int, batch_size: int, source_sizes: Sequence[int]) -> str:
    """Return why an order has this number of lanes, as text that follows the number; empty for 32."""
    if num_lanes == DEFAULT_LANES:
        return ""
    if num_lanes != derive_lanes(batch_size, source_sizes):
        return " (data.lanes)"
    is_limited_by_set = num_lanes != derive_lanes(batch_size, source_sizes[:1])
    set_part = f", and the smallest set has {min(source_sizes)} images" if is_limited_by_set else ""
    return f" ({DEFAULT_LANES} do not fit: lanes divide the batch of {batch_size}, with 2 images or more in each{set_part})"


def fitting_lanes(batch_size: int) -> list[int]:
    """Return the numbers of lanes, ascending, that divide a batch into 2 or more images each.

    Mixup takes the partner of an image from the same lane, hence the minimum of 2; a batch of 1 image has 1 lane.
    """
    return [number for number in divisors(batch_size) if batch_size // number >= 2 or batch_size == 1]


def check_lanes(batch_size: int, num_lanes: int) -> None:
    """Raise ConfigError, with the nearest valid number, unless the lanes fit the batch (``fitting_lanes``)."""
    fitting = fitting_lanes(batch_size)
    if num_lanes not in fitting:
        nearest = min(fitting, key=lambda number: (abs(number - num_lanes), number))
        raise ConfigError(
            f"data.lanes={num_lanes} does not fit a batch of {batch_size} images: lanes divide the batch, with 2 "
            f"images or more in each; leave it out (null), or take another: the nearest that fits is data.lanes={nearest}"
        )


def check_set_fills_batch(
    num_samples: int, batch_size: int, fraction: Fraction, num_lanes: int | None, num_ranks: int
) -> None:
    """Raise DataError, with a batch size that works, if the set is smaller than its ``fraction`` of one batch.

    ``num_lanes``: data.lanes as stated. ``num_ranks``: the ranks that have to divide the batch that is named.
    """
    if num_samples >= batch_size * fraction:
        return
    share = "" if fraction == 1 else f"its share, {float(batch_size * fraction):g}, of "
    problem = f"{share}a batch of {batch_size} images cannot be filled from {num_samples} samples"
    ranks = f", which {num_ranks} ranks divide" if num_ranks > 1 else ""
    largest = math.floor(num_samples / fraction)
    for lanes, addition in ((num_lanes, ""), (None, " and data.lanes=null")):
        if suggestion := suggest_batch_size(largest, num_ranks, lanes):
            raise DataError(f"{problem}: set batch.global_size={suggestion}{addition}{ranks}, or give more data")
    raise DataError(f"{problem}, and not one for each of {num_ranks} ranks: use fewer ranks, or give more data")


def suggest_batch_size(num_samples: int, num_ranks: int, num_lanes: int | None) -> int | None:
    """Return a batch size that ranks and stated lanes divide and the samples fill; None if there is none.

    It is the largest with a power of two of images on each rank of which four fill an epoch; of fewer samples, the
    largest of all.
    """
    unit = math.lcm(num_ranks, num_lanes or 1)
    smallest = unit if num_lanes is None or unit > num_lanes else 2 * unit
    if smallest > num_samples:
        return None
    quarter = num_samples // (_MIN_STEPS * smallest)
    return smallest * (1 << quarter.bit_length() - 1) if quarter else num_samples // unit * unit


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})
