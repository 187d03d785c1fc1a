"""Learning-rate curves as pure functions of the step: no scheduler object, nothing to save."""

import math
from collections.abc import Iterable


def warmup_cosine(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of the update that follows ``step`` finished ones.

    Linear from ``peak / warmup`` to ``peak`` over ``warmup`` steps, then half a cosine to ``floor`` at ``total``
    (Loshchilov & Hutter, SGDR, 2017, eq. 5 without restarts).
    """
    if step < warmup:
        return warmup_constant(step, peak=peak, warmup=warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant(step: int, *, peak: float, warmup: int) -> float:
    """The same warm-up, then ``peak`` for good."""
    return peak * (step + 1) / warmup if step < warmup else peak


def dropped(rate: float, *, drops: int, factor: float, floor: float) -> float:
    """A learning rate after so many drops, each by ``factor``; none takes it below ``floor``."""
    return max(rate * factor**drops, min(rate, floor))


def plateau_drops(values: Iterable[float], *, patience: int, higher_is_better: bool) -> int:
    """How often a rate has dropped that drops whenever ``patience`` values in a row were no better than the best before.

    The counting starts anew after a drop, and the best stays. A value that is not a number is no better than any.
    """
    best, waited, drops = -math.inf, 0, 0
    for value in values:
        signed = value if higher_is_better else -value
        best, waited = (signed, 0) if signed > best else (best, waited + 1)
        if waited == patience:
            drops, waited = drops + 1, 0
    return drops


def rising_average(step: int, *, start: float, total: int) -> float:
    """What a running average keeps of itself after step ``step`` of ``total``: half a cosine from ``start`` to 1 (BYOL, 2020)."""
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))


def early_average(step: int, keep: float) -> float:
    """What a running average keeps of itself after step ``step``: at most ``keep``, and less while there is little to keep.

    (1 + step) / (10 + step), as timm and TensorFlow have it: or the first weights would stay in it for 1 / (1 - keep) steps.
    """
    return min(keep, (1 + step) / (10 + step))
