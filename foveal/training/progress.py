"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from foveal.training.meters.metric_accumulator import MetricRow

_LINE_EVERY = 30.0  # seconds between lines in a log
_NUMBERS = 6  # of a result in a line
_log = logging.getLogger(__name__)


class ProgressReporter:
    """Rank 0's; without a name it is nobody's and shows nothing."""

    def __init__(self, name: str = "", total: int = 0, initial: int = 0) -> None:
        self._name, self._total = name, total
        self._spoke = 0.0
        self._bar: Bar | None = None
        if name and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[row]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=initial, row="")
            self._bar.start()

    def show_metrics(self, row: MetricRow) -> None:
        """The newest row of a run."""
        self.update(
            int(row["step"]), f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['images_per_second']:,.0f} images/s"
        )

    def update(self, done: int, text: str) -> None:
        """How far it is, and one line about it."""
        if not self._name:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, row=text)
        elif done == self._total or time.monotonic() - self._spoke > _LINE_EVERY:
            self._spoke = time.monotonic()
            _log.info("%s: %d of %d, %s", self._name, done, self._total, text)

    def log_results(self, step: int, results: Mapping[str, object]) -> None:
        """A line of what came of a step: the first numbers."""
        told = [f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float)]
        if self._name and told:
            _log.info("%s: step %d, %s", self._name, step, ", ".join(told[:_NUMBERS]))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
