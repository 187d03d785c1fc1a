"""Buckets in which DeepSpeed reduces gradients: their size, and whether a reduction overlaps the backward pass."""

from collections.abc import Collection, Mapping
from typing import Any

# ZeRO 1 to 3 reduce a bucket once it is full, and the last one after the backward pass. DeepSpeed's own buckets hold
# 5e8 elements, more than a ViT-H has: they never fill, and no reduction overlaps the backward pass.
_BUCKETS_PER_STEP = 4
_MAX_ELEMENTS = 50_000_000  # 200 MB in fp32: larger messages are no faster
_MIN_ELEMENTS = 1_000_000  # 4 MB: smaller messages cost latency


def derive_zero_options(
    zero_stage: int, trainable_numels: Collection[int], world_size: int, user_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return DeepSpeed's options of ``zero_optimization``: those derived from the model, then the user's.

    A bucket has a quarter of the trained elements (``trainable_numels``, per parameter), from 1 to 50 million, and at
    least the largest parameter. A reduction overlaps the backward pass where there are several ranks; where the user
    offloads, DeepSpeed's default decides, because gradients are copied to the host meanwhile.

    Where nothing overlaps, ZeRO 1 and 2 reduce gradients where they are: two copies of each less, the same sums. An
    overlapping reduction needs the buckets: without them DeepSpeed waits for the GPU before each.
    """
    if zero_stage == 0:  # reduces after the backward pass, without these options
        return dict(user_options)
    quarter = -(-sum(trainable_numels) // _BUCKETS_PER_STEP)
    size = max(min(max(quarter, _MIN_ELEMENTS), _MAX_ELEMENTS), max(trainable_numels, default=0))
    derived: dict[str, Any] = {"reduce_bucket_size": size}
    if not user_options.get("offload_optimizer"):
        derived["overlap_comm"] = world_size > 1
        if zero_stage < 3 and not user_options.get("overlap_comm", world_size > 1):
            derived["contiguous_gradients"] = False
    return derived | dict(user_options)
