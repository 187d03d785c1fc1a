"""Straggler metrics, under a clock that the test controls."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from clock import Clock

from foveal.training.meters.stragglers import StragglerMeter

CPU = torch.device("cpu")


def rank_record(
    clock: Clock, host: str, *, steps: int = 4, fetch: float = 0.5, forward: float = 0.25, micros: int = 2
) -> Any:
    """Return a rank's record for the gather after some steps with two waits of 10 s for other ranks each."""
    meter = StragglerMeter(CPU, host, clock)
    for _ in range(steps):
        with meter.time_data_fetch():
            clock.pass_(fetch)
        clock.pass_(10.0)
        for _ in range(micros):
            with meter.time_forward():
                clock.pass_(forward)
        meter.add_step()
        clock.pass_(10.0)
    return own_record(meter)


def own_record(meter: StragglerMeter) -> Any:
    records: list[Any] = []
    meter.pop_metrics_and_table(1, lambda value: records.append(value) or records)
    return records[0]


def test_waiting_for_others_is_nobodys_own_time() -> None:
    assert rank_record(Clock(), "a") == {"host": "a", "step_seconds": 1.0, "data_wait": 0.5}


def test_the_slowest_is_named_and_everybody_is_in_the_table() -> None:
    clock = Clock()
    other_records = [rank_record(clock, "a"), rank_record(clock, "b", fetch=2.5), rank_record(clock, "b", forward=0.5)]
    meter = StragglerMeter(CPU, "a", clock)
    with meter.time_data_fetch():
        clock.pass_(0.5)
    with meter.time_forward():
        clock.pass_(0.75)
    numbers, table = meter.pop_metrics_and_table(40, lambda record: [record, *other_records])
    assert numbers == {
        "slowest_rank": 2.0,
        "slowest_step_seconds": 3.0,
        "median_step_seconds": pytest.approx(1.375),
        "slowest_data_wait": pytest.approx(2.5 / 3.0),
    }
    assert [(row["step"], row["rank"], row["host"], row["step_seconds"]) for row in table] == [
        (40, 0, "a", 1.25),
        (40, 1, "a", 1.0),
        (40, 2, "b", 3.0),
        (40, 3, "b", 1.5),
    ]
    assert table[2]["data_wait"] == pytest.approx(2.5 / 3.0)


def test_of_a_thousand_ranks_the_slowest_are_in_the_table() -> None:
    clock = Clock()
    meter = StragglerMeter(CPU, "a", clock)
    with meter.time_data_fetch():
        clock.pass_(1.0)
    slow = range(5, 1000, 62)
    others = [{"host": "b", "step_seconds": 9.0 if rank in slow else 1.0, "data_wait": 0.5} for rank in range(1, 1000)]
    numbers, table = meter.pop_metrics_and_table(40, lambda record: [record, *others])
    assert [row["rank"] for row in table] == list(slow)[:16]
    assert (numbers["slowest_rank"], numbers["median_step_seconds"]) == (5.0, 1.0)


def test_each_report_is_of_the_time_since_the_last() -> None:
    clock = Clock()
    meter = StragglerMeter(CPU, "a", clock)
    for seconds in (1.0, 3.0):
        with meter.time_data_fetch():
            clock.pass_(seconds)
        assert own_record(meter)["step_seconds"] == seconds


def test_alone_or_before_a_step_there_is_nothing_to_compare() -> None:
    clock = Clock()
    meter = StragglerMeter(CPU, "a", clock)
    assert meter.pop_metrics_and_table(0, lambda record: [record, record]) == ({}, [])
    with meter.time_data_fetch():
        clock.pass_(1.0)
    assert meter.pop_metrics_and_table(1, lambda record: [record]) == ({}, [])


class Device:
    """A fake GPU queue: events hold the device's time of completion, not the host's time of recording."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds = 0.0
        device = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at, self.waited = -1.0, False

            def record(self) -> None:
                self.at = device.milliseconds

            def synchronize(self) -> None:
                self.waited = True

            def elapsed_time(self, end: "Event") -> float:
                assert end.waited, "elapsed_time needs a completed event"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)

    @contextmanager
    def kernels(self, milliseconds: float) -> Any:
        yield
        self.milliseconds += milliseconds


def test_a_gpu_is_timed_by_its_own_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    device, clock = Device(monkeypatch), Clock()
    meter = StragglerMeter(torch.device("cuda", 0), "a", clock)
    with meter.time_data_fetch():
        clock.pass_(0.5)
    for _ in range(2):
        with meter.time_forward(), device.kernels(750.0):
            clock.pass_(0.001)  # the host only queues
        device.milliseconds += 5000.0
    assert own_record(meter) == {"host": "a", "step_seconds": 2.0, "data_wait": 0.25}
