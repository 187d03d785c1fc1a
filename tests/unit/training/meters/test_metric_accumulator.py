"""Metrics accumulated on the device, and throughput under a clock that the test controls."""

import pytest
import torch
from clock import Clock
from torch import Tensor

from foveal.training.meters.metric_accumulator import MetricAccumulator, MetricRow
from foveal.training.meters.throughput import ThroughputMeter

APPLIED = {"step_applied": torch.tensor(True)}  # the same on every rank


def host(step: int) -> MetricRow:
    return {"step": step, "lr": step / 10}


def test_rows_are_reduced_once_and_what_is_equal_on_ranks_never() -> None:
    accumulator = MetricAccumulator()
    for step in (1, 2, 3):
        accumulator.add_step({"loss": torch.tensor(step / 2), "top1": torch.tensor(0.25)}, APPLIED, host(step))
    calls: list[Tensor] = []

    def two_equal_ranks(shares: Tensor) -> Tensor:
        calls.append(shares)
        return shares * 2

    rows = accumulator.pop_rows(two_equal_ranks)
    assert rows == [
        {"step": step, "loss": step, "top1": 0.5, "lr": step / 10, "step_applied": 1.0} for step in (1, 2, 3)
    ]
    assert [next(iter(row)) for row in rows] == ["step"] * 3
    assert len(calls) == 1
    assert calls[0].shape == (3, 2)
    assert calls[0].dtype == torch.float64


def test_what_was_read_is_gone_and_nothing_costs_no_collective() -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError("a collective for no rows")

    accumulator = MetricAccumulator()
    assert accumulator.pop_rows(never) == []
    accumulator.add_step({"loss": torch.tensor(1.0)}, APPLIED, host(1))
    assert len(accumulator.pop_rows(lambda shares: shares)) == 1
    assert accumulator.pop_rows(never) == []
    accumulator.add_step({"other": torch.tensor(2.0)}, APPLIED, host(2))  # the names may change after a read
    assert accumulator.pop_rows(lambda shares: shares) == [host(2) | {"other": 2.0, "step_applied": 1.0}]


def test_a_row_without_sums_keeps_its_place() -> None:
    accumulator = MetricAccumulator()
    accumulator.add_step({}, {}, host(1))
    assert accumulator.pop_rows(lambda _: pytest.fail("a collective for no sums")) == [host(1)]
    accumulator.add_step({"loss": torch.tensor(1.0)}, APPLIED, host(2))
    accumulator.add_step({}, {}, host(3))
    accumulator.add_step({"loss": torch.tensor(4.0)}, APPLIED, host(4))
    rows = accumulator.pop_rows(lambda shares: shares)
    assert rows == [
        host(2) | {"loss": 1.0, "step_applied": 1.0},
        host(3),
        host(4) | {"loss": 4.0, "step_applied": 1.0},
    ]


def test_numbers_keep_double_precision() -> None:
    accumulator = MetricAccumulator()
    accumulator.add_step({"loss": torch.tensor(1.0 + 2**-40, dtype=torch.float64)}, APPLIED, host(1))
    assert accumulator.pop_rows(lambda shares: shares)[0]["loss"] == 1.0 + 2**-40


def test_other_numbers_from_one_step_to_the_next_are_a_programmers_mistake() -> None:
    accumulator = MetricAccumulator()
    accumulator.add_step({"loss": torch.tensor(1.0)}, APPLIED, host(1))
    with pytest.raises(AssertionError, match="same numbers every step"):
        accumulator.add_step({"loss": torch.tensor(1.0), "more": torch.tensor(1.0)}, APPLIED, host(2))


def test_a_graph_is_not_kept_alive() -> None:
    accumulator = MetricAccumulator()
    accumulator.add_step({"loss": torch.ones(1, requires_grad=True).sum()}, APPLIED, host(1))
    graphs: list[bool] = []
    accumulator.pop_rows(lambda shares: graphs.append(shares.requires_grad) or shares)
    assert graphs == [False]


def test_images_per_second_and_the_share_of_waiting() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    for _ in range(4):
        with meter.time_data_wait():
            clock.pass_(0.5)
        clock.pass_(1.5)
        meter.add_images(32)
    assert meter.pop_rates() == {"images_per_second": 16.0, "data_wait": 0.25}
    clock.pass_(2.0)
    meter.add_images(32)
    assert meter.pop_rates() == {"images_per_second": 16.0, "data_wait": 0.0}, (
        "rates cover the time since the last read"
    )
    assert meter.training_seconds == 10.0


def test_pauses_are_no_training() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    clock.pass_(2.0)
    meter.add_images(10)
    with meter.exclude_time():
        clock.pass_(100.0)
    clock.pass_(3.0)
    assert meter.pop_rates() == {"images_per_second": 2.0, "data_wait": 0.0}
    with meter.exclude_time():
        clock.pass_(7.0)
    assert meter.training_seconds == 5.0
    clock.pass_(1.0)
    meter.add_images(8)
    assert meter.pop_rates()["images_per_second"] == 8.0


def test_a_restart_goes_on_counting_and_does_not_count_the_time_between() -> None:
    clock = Clock()
    first = ThroughputMeter(clock=clock)
    clock.pass_(60.0)
    saved = first.training_seconds
    clock.pass_(3600.0)
    second = ThroughputMeter(saved, clock)
    clock.pass_(5.0)
    second.add_images(10)
    assert second.training_seconds == 65.0
    assert second.pop_rates()["images_per_second"] == 2.0


def test_no_time_at_all_is_no_division_by_zero() -> None:
    meter = ThroughputMeter(clock=Clock())
    meter.add_images(1)
    rates = meter.pop_rates()
    assert rates["images_per_second"] > 0
    assert rates["data_wait"] == 0.0
