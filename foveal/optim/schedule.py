"""Learning-rate and EMA-decay schedules as pure functions of the step, without state to save."""

import math
from collections.abc import Iterable


def warmup_cosine_lr(
    finished_steps: int, *, peak_lr: float, min_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of the update after ``step`` finished steps.

    Linear from ``peak_lr / warmup_steps`` to ``peak_lr`` over ``warmup_steps``, then half a cosine to ``min_lr`` at
    ``total_steps`` (Loshchilov & Hutter, SGDR, 2017, eq. 5 without restarts).
    """
    if finished_steps < warmup_steps:
        return warmup_constant_lr(finished_steps, peak_lr=peak_lr, warmup_steps=warmup_steps)
    progress = min(1.0, (finished_steps - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant_lr(finished_steps: int, *, peak_lr: float, warmup_steps: int) -> float:
    """Return the learning rate of a linear warm-up to a constant ``peak_lr``."""
    return peak_lr * (finished_steps + 1) / warmup_steps if finished_steps < warmup_steps else peak_lr


def step_decay_lr(lr: float, *, num_drops: int, factor: float, min_lr: float) -> float:
    """Return a learning rate after ``num_drops`` drops by ``factor``; a drop stops at ``min_lr``."""
    return max(lr * factor**num_drops, min(lr, min_lr))


def count_plateau_drops(values: Iterable[float], *, patience: int, higher_is_better: bool) -> int:
    """Return the number of drops of a plateau schedule: a drop follows ``patience`` values in a row without a new best.

    A drop resets the count and keeps the best value. NaN is never a new best.
    """
    best = -math.inf
    num_bad = 0
    drops = 0
    for value in values:
        signed = value if higher_is_better else -value
        if signed > best:
            best = signed
            num_bad = 0
        else:
            num_bad += 1
        if num_bad == patience:
            drops += 1
            num_bad = 0
    return drops


def cosine_ema_decay(step: int, *, start_decay: float, total_steps: int) -> float:
    """Return the EMA decay after ``step`` steps: half a cosine from ``start_decay`` to 1 (BYOL, 2020)."""
    return 1.0 - (1.0 - start_decay) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def warmup_ema_decay(step: int, decay: float) -> float:
    """Return the EMA decay after ``step`` steps: min(decay, (1 + step) / (10 + step)).

    It is that of TensorFlow's ``tf.train.ExponentialMovingAverage`` with ``num_updates``. timm's ``ModelEmaV3`` has no
    warm-up by default, and min(decay, 1 - (1 + step)^(-2/3)) on request. Without a warm-up the initial weights would
    dominate the average for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))
