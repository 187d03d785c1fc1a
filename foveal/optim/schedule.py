"""Learning-rate curves as pure functions of the step: no scheduler object, nothing to save."""

import math
from collections.abc import Iterable


def warmup_cosine(step: int, *, peak_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of the update that follows ``step`` finished ones.

    Linear from ``peak / warmup`` to ``peak`` over ``warmup`` steps, then half a cosine to ``floor`` at ``total``
    (Loshchilov & Hutter, SGDR, 2017, eq. 5 without restarts).
    """
    if step < warmup_steps:
        return warmup_constant(step, peak_lr=peak_lr, warmup_steps=warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant(step: int, *, peak_lr: float, warmup_steps: int) -> float:
    """The same warm-up, then ``peak`` for good."""
    return peak_lr * (step + 1) / warmup_steps if step < warmup_steps else peak_lr


def step_decay_lr(lr: float, *, num_drops: int, factor: float, min_lr: float) -> float:
    """A learning rate after so many drops, each by ``factor``; none takes it below ``floor``."""
    return max(lr * factor**num_drops, min(lr, min_lr))


def count_plateau_drops(values: Iterable[float], *, patience: int, higher_is_better: bool) -> int:
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


def cosine_ema_decay(step: int, *, start_decay: float, total_steps: int) -> float:
    """What a running average keeps of itself after step ``step`` of ``total``: half a cosine from ``start`` to 1 (BYOL, 2020)."""
    return 1.0 - (1.0 - start_decay) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def warmup_ema_decay(step: int, decay: float) -> float:
    """What a running average keeps of itself after step ``step``: at most ``keep``, and less while there is little to keep.

    (1 + step) / (10 + step), as timm and TensorFlow have it: or the first weights would stay in it for 1 / (1 - keep) steps.
    """
    return min(decay, (1 + step) / (10 + step))
