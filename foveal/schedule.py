"""Learning-rate curves as pure functions of the step: no scheduler object, nothing to save."""

import math


def warmup_cosine(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of the update that follows ``step`` finished ones.

    Linear from ``peak / warmup`` to ``peak`` over ``warmup`` steps, then half a cosine to ``floor`` at ``total``
    (Loshchilov & Hutter, SGDR, 2017, eq. 5 without restarts).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def rising_average(step: int, *, start: float, total: int) -> float:
    """What a running average keeps of itself after step ``step`` of ``total``: half a cosine from ``start`` to 1 (BYOL, 2020)."""
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))


def early_average(step: int, keep: float) -> float:
    """What a running average keeps of itself after step ``step``: at most ``keep``, and less while there is little to keep.

    (1 + step) / (10 + step), as timm and TensorFlow have it: or the first weights would stay in it for 1 / (1 - keep) steps.
    """
    return min(keep, (1 + step) / (10 + step))
