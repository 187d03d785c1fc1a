"""Progress of a run on stderr: a bar on a terminal, a line now and then in a log."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Console

from foveal.quantities import format_duration
from foveal.training.live_bar import BarContent, LiveBar
from foveal.training.meters.metric_accumulator import MetricRow
from foveal.training.meters.throughput import ThroughputMeter

_LINE_INTERVAL_SECONDS = 30.0
_LONG_ACTIVITY_SECONDS = 2.0  # a log says how long it took
_MAX_METRICS_PER_LINE = 6
# The time left is that of the mean of the last ten minutes or more: it contains evaluations and saves.
_SAMPLE_INTERVAL_SECONDS, _MAX_SAMPLES = 1.0, 600
_MIN_RATE_SECONDS = 5.0  # rates over less time are noise
_log = logging.getLogger(__name__)


class Activity:
    """Something other than training that is going on, with a number of images if it is known."""

    def __init__(self, text: str, total: int, tick: Callable[[], None], started_at: float) -> None:
        self._text, self._total, self._tick, self.started_at = text, total, tick, started_at
        self._done = 0

    def advance(self, num_images: int) -> None:
        """Count finished images; padding at the end of a split counts for nothing."""
        self._done = min(self._done + num_images, self._total)
        self._tick()

    def describe(self) -> str:
        """Return what is going on."""
        return f"{self._text}: {self._done:,} of {self._total:,} images" if self._total else self._text


class ProgressReporter:
    """Reports progress on rank 0; without a name it reports nothing.

    ``noun``: what is counted: steps, or the trials, folds or probes of a run that consists of several. ``stop``: the
    last step of this attempt, if it is not ``total``. ``outer``: the reporter of the run that contains this one, on
    whose bar and under whose name this one reports.
    """

    def __init__(
        self,
        name: str = "",
        total: int = 0,
        done: int = 0,
        *,
        noun: str = "step",
        stop: int | None = None,
        steps_per_epoch: int = 0,
        get_meter: Callable[[], ThroughputMeter] | None = None,
        outer: "ProgressReporter | None" = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = outer.name if outer is not None else name
        self._total, self._done, self._stop, self._noun = total, done, stop or total, noun
        self._steps_per_epoch, self._get_meter, self._clock = steps_per_epoch, get_meter, clock
        self._label = ""
        self._row: MetricRow = {}
        self._activity: Activity | None = None
        self._outer, self._inner = outer, cast("ProgressReporter | None", None)
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)  # (seconds, position)
        self._next_sample_time = 0.0
        self._next_line_time = -math.inf if noun == "step" else clock() + _LINE_INTERVAL_SECONDS
        self._bar: LiveBar | None = None
        if outer is not None:
            outer.set_inner(self)
            if done:  # an earlier attempt's steps took no time
                outer.forget_pace()
        elif name and (console is not None or LiveBar.is_possible()):
            self._bar = LiveBar(self.describe, console)
            self._bar.start()

    # --- what the run reports ---

    def advance(self, step: int) -> None:
        """Report a finished step. It costs a microsecond: neither the device nor another rank is asked."""
        self._done = step
        self.tick()

    def move_to(self, step: int) -> None:
        """Go on from another step, as after a roll-back: the time left is estimated anew."""
        self._done = step
        self.forget_pace()

    def forget_pace(self) -> None:
        """Estimate the time left from now on."""
        self._samples.clear()

    def set_inner(self, inner: "ProgressReporter | None") -> None:
        """Show the progress of a run that this one contains."""
        self._inner = inner

    def show_row(self, row: MetricRow) -> None:
        """Show the loss and the rates of a metric row; a log gets the line of the last step."""
        self._row = row
        if self._done == self._stop and self._outer is None:
            self._log_line()

    def begin_part(self, number: int, label: str) -> None:
        """Report that a trial, fold or probe begins; ``number`` counts from 1."""
        self._done, self._label = number - 1, label
        self.tick()

    def finish_part(self, number: int, result: str) -> None:
        """Log the result of a trial, fold or probe in one line."""
        part = self.describe_position()
        self._done, self._label, self._inner = number, "", None
        self._remember_position(self._clock())
        self._log_text(f"{part}: {', '.join(filter(None, [result, self._describe_time_left()]))}")

    @contextmanager
    def activity(self, text: str, total_images: int = 0) -> Iterator[Activity]:
        """Show what is going on in a block. A log gets a line every 30 s, and at the end if it took more than 2 s."""
        outer_activity, activity = self._activity, Activity(text, total_images, self.tick, self._clock())
        self._activity = activity
        try:
            yield activity
        finally:
            self._activity = outer_activity
        seconds = self._clock() - activity.started_at
        is_long = self._noun == "step" and seconds >= (
            _LINE_INTERVAL_SECONDS if self._outer else _LONG_ACTIVITY_SECONDS
        )
        if is_long and not self.has_bar and outer_activity is None:
            self._log_text(f"{text} took {format_duration(seconds)}")

    def log_results(self, step: int, results: Mapping[str, Any]) -> None:
        """Log float results of a step in one line, the first six by name."""
        metrics = [f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float)]
        if metrics and self._outer is None:
            more = len(metrics) - _MAX_METRICS_PER_LINE
            shown = metrics[:_MAX_METRICS_PER_LINE] + ([f"{more} more in metrics.jsonl"] if more > 0 else [])
            self._log_text(f"step {step:,}, {', '.join(shown)}")

    def close(self) -> None:
        """Leave the bar in its current state."""
        if self._outer is not None:
            self._outer.set_inner(None)
        if self._bar is not None:
            self._bar.stop()

    # --- what is shown ---

    def describe(self) -> BarContent:
        """Return what the bar shows."""
        position = ", ".join(filter(None, [self.describe_position(), self._describe_time_left()]))
        return BarContent(self.name, self.fraction, position, self.describe_details())

    def describe_position(self) -> str:
        """Return which step or part is reached."""
        if self._noun == "step":
            return f"step {self._done:,} of {self._total:,}"
        part = f"{self._noun} {min(self._done + 1, self._total):,} of {self._total:,}"
        return f"{part} ({self._label})" if self._label else part

    def describe_details(self) -> str:
        """Return what is going on in a long activity, else epoch, loss and rates; of the inner run, if there is one."""
        inner, activity = self._inner, self._activity  # another thread may be about to change them
        if activity is not None:
            return f"{activity.describe()}, {format_duration(self._clock() - activity.started_at)}"
        if inner is not None:
            return f"{inner.describe_position()}, {inner.describe_details()}"
        if self._noun != "step":
            return ""
        return ", ".join(filter(None, [self._describe_epoch(), *self._describe_metrics()])) or "the first step"

    def _describe_epoch(self) -> str:
        if not self._steps_per_epoch or not self._done:
            return ""
        return f"epoch {math.ceil(self._done / self._steps_per_epoch)} of {self._total // self._steps_per_epoch}"

    def _describe_metrics(self) -> list[str]:
        rates, row = self._row, self._row
        meter = self._get_meter() if self._get_meter is not None else None
        if meter is not None and (not rates or meter.window_seconds >= _MIN_RATE_SECONDS):
            rates = meter.read_rates() if self._samples else {}
        texts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
        if "images_per_second" in rates:
            texts += [f"{rates['images_per_second']:,.0f} images/s", f"data wait {rates['data_wait']:.0%}"]
        return texts

    def _describe_time_left(self) -> str:
        if len(self._samples) < 2:
            return ""
        (first_time, first), (last_time, last) = self._samples[0], self._samples[-1]
        if last <= first or self._done >= self._stop:
            return ""
        seconds_left = (self._stop - last) * (last_time - first_time) / (last - first) - (self._clock() - last_time)
        goal = f" to step {self._stop:,}" if self._stop < self._total else " left"
        return format_duration(max(seconds_left, 0.0)) + goal

    # --- counting and logging ---

    @property
    def has_bar(self) -> bool:
        """Whether a bar shows the progress, that of the outer run too."""
        return self._outer.has_bar if self._outer is not None else self._bar is not None

    @property
    def fraction(self) -> float:
        """The finished part in [0, 1]."""
        return self._position / max(self._total, 1)

    @property
    def _position(self) -> float:
        inner = self._inner
        return self._done + (inner.fraction if inner is not None else 0.0)

    def tick(self) -> None:
        """Remember the position now and then, for the time left; in a log, write a line now and then."""
        now = self._clock()
        if now >= self._next_sample_time or not self._samples:
            self._remember_position(now)
        if self._outer is not None:
            self._outer.tick()
        elif now >= self._next_line_time and self._bar is None:
            self._log_line()

    def _remember_position(self, now: float) -> None:
        self._next_sample_time = now + _SAMPLE_INTERVAL_SECONDS
        self._samples.append((now, self._position))

    def _log_line(self) -> None:
        """Log where the run is, unless a bar shows it."""
        self._next_line_time = self._clock() + _LINE_INTERVAL_SECONDS
        if self._bar is None:
            content = self.describe()
            self._log_text(", ".join(filter(None, [content.position, content.details])))

    def _log_text(self, text: str) -> None:
        if self.name:
            _log.info("%s: %s", self.name, text)
