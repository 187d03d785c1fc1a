"""Learning-rate schedules: boundary values, and equality with torch's schedulers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.optim.schedule import (
    cosine_ema_decay,
    count_plateau_drops,
    step_decay_lr,
    warmup_constant_lr,
    warmup_cosine_lr,
    warmup_ema_decay,
)


def test_the_corners() -> None:
    def lr(step: int) -> float:
        return warmup_cosine_lr(step, peak_lr=8.0, min_lr=2.0, warmup_steps=4, total_steps=12)

    assert [lr(step) for step in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert lr(8) == pytest.approx((8.0 + 2.0) / 2)
    assert lr(12) == pytest.approx(2.0)
    assert lr(100) == pytest.approx(2.0)


def test_the_first_step_learns_with_and_without_warmup() -> None:
    assert warmup_cosine_lr(0, peak_lr=1.0, min_lr=0.0, warmup_steps=1000, total_steps=2000) == 1e-3
    assert warmup_cosine_lr(0, peak_lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=10) == 1.0
    assert 0 < warmup_cosine_lr(9, peak_lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=10) < 0.1


def test_warmup_as_long_as_the_run_never_divides_by_zero() -> None:
    assert [warmup_cosine_lr(step, peak_lr=2.0, min_lr=0.0, warmup_steps=2, total_steps=2) for step in range(3)] == [
        1.0,
        2.0,
        2.0,
    ]


def test_after_the_warmup_it_is_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-5)
    for step in range(10, 50):
        lr = warmup_cosine_lr(step, peak_lr=3e-3, min_lr=1e-5, warmup_steps=10, total_steps=50)
        assert lr == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@given(st.integers(0, 50), st.integers(1, 100), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_it_rises_once_and_falls_once_between_floor_and_peak(
    warmup: int, further: int, peak: float, share: float
) -> None:
    total = warmup + further
    floor = peak * share
    rates = [
        warmup_cosine_lr(step, peak_lr=peak, min_lr=floor, warmup_steps=warmup, total_steps=total)
        for step in range(total + 1)
    ]
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert max(rates) == pytest.approx(peak)
    assert min(rates[warmup:]) == pytest.approx(floor, abs=1e-12)


def test_drops_are_torchs_steps_down_to_the_floor() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[4, 7], gamma=0.1)
    for step in range(10):
        drops = (step >= 4) + (step >= 7)
        rate = step_decay_lr(
            warmup_constant_lr(step, peak_lr=0.3, warmup_steps=0), num_drops=drops, factor=0.1, min_lr=0.0
        )
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert step_decay_lr(0.3, num_drops=2, factor=0.1, min_lr=0.01) == 0.01
    assert step_decay_lr(0.001, num_drops=0, factor=0.1, min_lr=0.01) == 0.001  # a warm-up begins below the floor


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4), st.booleans())
def test_a_plateau_drops_when_torchs_does(values: list[int], patience: int, higher: bool) -> None:
    """torch drops after one evaluation more than its patience."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    mode = "max" if higher else "min"
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.5, patience=patience - 1, threshold=0.0, threshold_mode="abs", eps=0.0
    )
    for count, value in enumerate(values, start=1):
        scheduler.step(float(value))
        drops = count_plateau_drops(map(float, values[:count]), patience=patience, higher_is_better=higher)
        assert optimizer.param_groups[0]["lr"] == 0.5**drops


def test_what_is_no_number_is_no_better() -> None:
    values = [math.nan, 2.0, math.nan, 1.0, math.nan, math.nan]
    drops = [count_plateau_drops(values[:count], patience=2, higher_is_better=False) for count in range(7)]
    assert drops == [0, 0, 0, 0, 0, 0, 1]


def test_the_decay_of_an_average_warms_up_as_tensorflows() -> None:
    """timm's warm-up reaches 0.9 later: at step 31 instead of 80."""
    assert [warmup_ema_decay(step, 0.999) for step in (1, 8, 80)] == [2 / 11, 0.5, 0.9]
    assert [warmup_ema_decay(step, 0.999) for step in (8980, 8990, 10**6)] == [8981 / 8990, 0.999, 0.999]


def test_the_decay_of_a_target_encoder_is_byols() -> None:
    """1 - (1 - start) (cos(pi k / K) + 1) / 2; I-JEPA's code rises linearly between the same ends."""
    decays = [cosine_ema_decay(step, start_decay=0.996, total_steps=100) for step in (0, 25, 50, 100, 200)]
    assert decays == pytest.approx([0.996, 1 - 0.004 * (math.sqrt(0.5) + 1) / 2, 0.998, 1.0, 1.0], abs=1e-12)
