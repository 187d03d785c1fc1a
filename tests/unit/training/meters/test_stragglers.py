"""Which rank the others wait for, under a clock that a test moves."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from clock import Clock

from foveal.training.meters.stragglers import StragglerMeter

CPU = torch.device("cpu")


def rank(clock: Clock, host: str, *, steps: int = 4, fetch: float = 0.5, forward: float = 0.25, micros: int = 2) -> Any:
    """What a rank brings to the gather after some steps; the waits for others cost it ten seconds each."""
    own = StragglerMeter(CPU, host, clock)
    for _ in range(steps):
        with own.time_data_fetch():
            clock.pass_(fetch)
        clock.pass_(10.0)
        for _ in range(micros):
            with own.time_forward():
                clock.pass_(forward)
        clock.pass_(10.0)
    return brought(own)


def brought(own: StragglerMeter) -> Any:
    mine: list[Any] = []
    own.report(1, lambda value: mine.append(value) or mine)
    return mine[0]


def test_waiting_for_others_is_nobodys_own_time() -> None:
    assert rank(Clock(), "a") == {"host": "a", "step_seconds": 1.0, "data_wait": 0.5}


def test_the_slowest_is_named_and_everybody_is_in_the_table() -> None:
    clock = Clock()
    others = [rank(clock, "a"), rank(clock, "b", fetch=2.5), rank(clock, "b", forward=0.5)]
    own = StragglerMeter(CPU, "a", clock)
    with own.time_data_fetch():
        clock.pass_(0.5)
    with own.time_forward():
        clock.pass_(0.75)
    numbers, table = own.report(40, lambda mine: [mine, *others])
    assert numbers == {
        "slowest_rank": 2.0,
        "slowest_step_seconds": 3.0,
        "median_step_seconds": pytest.approx(1.375),
        "slowest_data_wait": pytest.approx(2.5 / 3.0),
    }
    assert [(line["step"], line["rank"], line["host"], line["step_seconds"]) for line in table] == [
        (40, 0, "a", 1.25),
        (40, 1, "a", 1.0),
        (40, 2, "b", 3.0),
        (40, 3, "b", 1.5),
    ]
    assert table[2]["data_wait"] == pytest.approx(2.5 / 3.0)


def test_each_report_is_of_the_time_since_the_last() -> None:
    clock = Clock()
    own = StragglerMeter(CPU, "a", clock)
    for seconds in (1.0, 3.0):
        with own.time_data_fetch():
            clock.pass_(seconds)
        assert brought(own)["step_seconds"] == seconds


def test_alone_or_before_a_step_there_is_nothing_to_compare() -> None:
    clock = Clock()
    own = StragglerMeter(CPU, "a", clock)
    assert own.report(0, lambda mine: [mine, mine]) == ({}, [])
    with own.time_data_fetch():
        clock.pass_(1.0)
    assert own.report(1, lambda mine: [mine]) == ({}, [])


class Device:
    """A GPU's queue: its events know when the device came to them, not when the host recorded them."""

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
                assert end.waited, "only what the device has reached can be asked"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)

    @contextmanager
    def kernels(self, milliseconds: float) -> Any:
        yield
        self.milliseconds += milliseconds


def test_a_gpu_is_timed_by_its_own_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    device, clock = Device(monkeypatch), Clock()
    own = StragglerMeter(torch.device("cuda", 0), "a", clock)
    with own.time_data_fetch():
        clock.pass_(0.5)
    for _ in range(2):
        with own.time_forward(), device.kernels(750.0):
            clock.pass_(0.001)  # the host only queues
        device.milliseconds += 5000.0
    assert brought(own) == {"host": "a", "step_seconds": 2.0, "data_wait": 0.25}
