"""Progress of a run on stderr: a bar on a terminal, periodic lines in a log."""

import logging
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from foveal.training.meters.metric_accumulator import MetricRow

_LINE_INTERVAL_SECONDS = 30.0
_MAX_METRICS_PER_LINE = 6
_log = logging.getLogger(__name__)


class ProgressReporter:
    """Reports progress on rank 0; without a name it reports nothing."""

    def __init__(self, name: str = "", total: int = 0, initial: int = 0) -> None:
        self._name, self._total = name, total
        self._last_line_time = 0.0
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
        """Show loss, learning rate and throughput of a metric row."""
        self.update(
            int(row["step"]), f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['images_per_second']:,.0f} images/s"
        )

    def update(self, completed: int, text: str) -> None:
        """Show the number of finished steps and a text; a log gets a line every 30 s and at the end."""
        if not self._name:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, row=text)
        elif completed == self._total or time.monotonic() - self._last_line_time > _LINE_INTERVAL_SECONDS:
            self._last_line_time = time.monotonic()
            _log.info("%s: %d of %d, %s", self._name, completed, self._total, text)

    def log_results(self, step: int, results: Mapping[str, object]) -> None:
        """Log the first six float results of a step in one line."""
        metrics = [f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float)]
        if self._name and metrics:
            _log.info("%s: step %d, %s", self._name, step, ", ".join(metrics[:_MAX_METRICS_PER_LINE]))

    def close(self) -> None:
        """Stop the bar in its current state."""
        if self._bar is not None:
            self._bar.stop()
