"""Progress on a terminal, where nothing may share the bar's line, and in a log."""

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from clock import Clock
from rich.console import Console
from screen import read_screen

from foveal.quantities import format_count, format_duration
from foveal.training import live_bar
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.progress import ProgressReporter

_DEFAULTS: dict[str, Any] = {"name": "run", "total": 1200, "steps_per_epoch": 60}


@pytest.fixture(autouse=True)
def no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's thread draws nothing between two lines of a test."""
    monkeypatch.setattr(live_bar, "_REFRESHES_PER_SECOND", 1e-3)


def reporter(clock: Clock, **changes: Any) -> ProgressReporter:
    return ProgressReporter(**{**_DEFAULTS, "clock": clock, **changes})


@contextmanager
def on_terminal(**changes: Any) -> Iterator[tuple[ProgressReporter, io.StringIO]]:
    """Progress on a terminal, and what arrives on its stderr, where foveal's log goes as well."""
    before, stream = sys.stderr, io.StringIO()
    sys.stderr = stream
    handler, log = logging.StreamHandler(), logging.getLogger("foveal")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    console = Console(file=stream, force_terminal=True, width=80)
    progress = reporter(Clock(), console=console, **changes)
    try:
        yield progress, stream
        progress.close()
        assert handler.stream is stream
        assert sys.stderr is stream
    finally:
        log.removeHandler(handler)
        sys.stderr = before


def test_nothing_shares_the_line_of_the_bar() -> None:
    with on_terminal() as (progress, written):
        progress.advance(7)
        logging.getLogger("foveal").info(
            "a message of %s characters that needs a second line of the terminal", "x" * 60
        )
        sys.stderr.write(warnings.formatwarning("take care", UserWarning, "module.py", 1))
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            traceback.print_exc()
        sys.stderr.write("half a line, ")
        sys.stderr.write("and its end\n\rold\rnew state of a library's own bar\nan unfinished line")
        progress.show_row({"step": 7.0, "loss": 0.5})
        progress.close()
        sys.stderr.write("directly")
    lines = read_screen(written.getvalue())
    bar = next(at for at, line in enumerate(lines) if line.startswith("run ━"))
    assert lines[bar].endswith("━ step 7 of 1,200")
    assert lines[bar + 1 :] == ["epoch 1 of 20, loss 0.5000", "directly"]
    above = "\n".join(lines[:bar])
    assert "━" not in above
    assert lines[0] == f"a message of {'x' * 60} charac"
    assert lines[1] == "ters that needs a second line of the terminal"
    for text in ("UserWarning: take care", "\nZeroDivisionError: division by zero\n", "\nhalf a line, and its end\n"):
        assert text in above
    assert above.endswith("\nnew state of a library's own bar\nan unfinished line")


def test_a_killed_process_leaves_a_cursor() -> None:
    with on_terminal() as (_, written):
        assert written.getvalue().rfind("\x1b[?25h") > written.getvalue().rfind("\x1b[?25l")


def test_a_forked_process_writes_past_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal() as (_, written), monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -2)
        before = written.tell()
        sys.stderr.write("half")
        assert written.getvalue()[before:] == "half"


def test_a_log_has_the_first_step_then_two_lines_a_minute_and_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foveal")
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    progress = reporter(clock, total=60, get_meter=lambda: meter)
    for step in range(1, 61):
        with meter.time_data_wait():
            clock.pass_(0.25)
        clock.pass_(0.75)
        meter.add_images(64)
        progress.advance(step)
        if step % 20 == 0:
            progress.show_row({"step": step, "loss": 1 / step, **meter.pop_rates()})
    rates = "64 images/s, data wait 25%"
    assert caplog.messages == [
        f"run: step 1 of 60, epoch 1 of 1, {rates}",
        f"run: step 31 of 60, 29 s left, epoch 1 of 1, loss 0.0500, {rates}",
        f"run: step 60 of 60, epoch 1 of 1, loss 0.0167, {rates}",
    ]


def test_the_time_left_begins_anew_after_a_roll_back_and_ends_where_the_attempt_stops() -> None:
    clock = Clock()
    progress = reporter(clock, done=100, stop=500)
    for step in range(101, 111):
        clock.pass_(2.0)
        progress.advance(step)
    assert progress.describe().position == "step 110 of 1,200, 13 min 0 s to step 500"
    assert progress.describe().fraction == 110 / 1200
    progress.move_to(50)
    assert progress.describe().position == "step 50 of 1,200"
    for step in (51, 52):
        clock.pass_(4.0)
        progress.advance(step)
    assert progress.describe().position == "step 52 of 1,200, 29 min 52 s to step 500"


def test_a_long_activity_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foveal")
    clock = Clock()
    progress = reporter(clock)
    with progress.activity("saving"):
        clock.pass_(1.0)
    with progress.activity("evaluating"):
        with progress.activity("evaluating on val", 1000) as activity:
            clock.pass_(40.0)
            activity.advance(256)
            assert progress.describe().details == "evaluating on val: 256 of 1,000 images, 40 s"
            activity.advance(2000)
        assert progress.describe().details == "evaluating, 40 s"
    assert progress.describe().details == "the first step"
    assert caplog.messages == [
        "run: step 0 of 1,200, evaluating on val: 256 of 1,000 images, 40 s",
        "run: evaluating took 40 s",
    ]


def test_a_run_in_a_run_moves_the_bar_of_the_outer_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foveal")
    clock = Clock()
    outer = reporter(clock, name="compare", total=4, steps_per_epoch=0, noun="trial")
    outer.begin_part(1, "mae, lr 0.1, seed 0")
    outer.move_to(1)  # an earlier attempt has finished it
    outer.begin_part(2, "mae, lr 0.1, seed 1")
    inner = reporter(clock, name="ignored", total=10, steps_per_epoch=5, outer=outer)
    for step in range(1, 6):
        clock.pass_(7.0)
        inner.advance(step)
    inner.show_row({"step": 5.0, "loss": 0.25})
    content = outer.describe()
    assert content.name == "compare"
    assert content.fraction == 1.5 / 4
    assert content.position == "trial 2 of 4 (mae, lr 0.1, seed 1), 2 min 55 s left"
    assert content.details == "step 5 of 10, epoch 1 of 2, loss 0.2500"
    inner.log_results(5, {"val_top1": 0.5})
    clock.pass_(35.0)
    inner.close()
    outer.finish_part(2, "val_top1 0.5000")
    assert caplog.messages == [
        "compare: trial 2 of 4 (mae, lr 0.1, seed 1), 2 min 55 s left, step 5 of 10, epoch 1 of 2",
        "compare: trial 2 of 4 (mae, lr 0.1, seed 1): val_top1 0.5000, 2 min 20 s left",
    ]


def test_results_beyond_six_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foveal")
    reporter(Clock()).log_results(9, {"best_step": 3, **{f"m{number}": 0.5 for number in range(8)}})
    (line,) = caplog.messages
    assert line.startswith("run: step 9, m0 0.5000, ")
    assert line.endswith("m5 0.5000, 2 more in metrics.jsonl")


def test_a_step_costs_microseconds() -> None:
    progress = ProgressReporter("run", 10**6)
    progress.advance(1)
    start = time.thread_time()
    for step in range(2, 20_002):
        progress.advance(step)
    assert (time.thread_time() - start) / 20_000 < 50e-6


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (90_000, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_number_has_its_noun() -> None:
    assert [format_count(number, "epoch") for number in (0, 1, 1.0, 0.5, 3, 1234567)] == [
        "0 epochs",
        "1 epoch",
        "1 epoch",
        "0.5 epochs",
        "3 epochs",
        "1234567 epochs",
    ]
    assert format_count(2, "microbatch") == "2 microbatches"
