"""The trackers of a run with nested runs and of these: one uploader delivers all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.nested import SyncWithNested
from foveal.tracking.tracker import AttemptState, MetricRow, Tracker
from foveal.tracking.uploader import Uploader, UploadingTracker


class OuterTracker(UploadingTracker):
    """The tracker of a run whose uploader also delivers its nested runs."""

    def __init__(self, jsonl_tracker: JsonlTracker, uploader: Uploader, sync: SyncWithNested) -> None:
        super().__init__(jsonl_tracker, uploader)
        self.uploader, self.sync = uploader, sync

    def add_nested(self, folder: Path, jsonl_tracker: JsonlTracker) -> Tracker:
        """Return the tracker of a nested run that begins."""
        return NestedTracker(folder, jsonl_tracker, self)


class NestedTracker:
    """Writes to a nested run's directory and wakes the outer run's uploader; it waits for nothing."""

    def __init__(self, folder: Path, jsonl_tracker: JsonlTracker, outer: OuterTracker) -> None:
        self._folder, self._jsonl_tracker, self._outer = folder, jsonl_tracker, outer
        self._sync = outer.sync.add_live(folder, jsonl_tracker.open_tail())

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str], changed: Sequence[str] = ()) -> None:
        self._jsonl_tracker.log_settings(settings, tags, changed)
        self._outer.uploader.notify()

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        self._jsonl_tracker.log_rows(rows)
        self._outer.uploader.notify()

    def log_results_once(self, results: MetricRow, step: int) -> None:
        self._jsonl_tracker.log_results_once(results, step)
        self._outer.uploader.notify()

    def log_file(self, path: Path) -> None:
        self._sync.queue_file(path)
        self._outer.uploader.notify()

    def rewind(self, to_step: int) -> None:
        self._jsonl_tracker.rewind(to_step)
        self._sync.on_rewind()
        self._outer.uploader.notify()

    def skip_flush(self) -> None:
        """Let the outer run's end not wait either: both leave for the same reason."""
        self._outer.skip_flush()

    def close(self, state: AttemptState, reason: str = "") -> None:
        try:
            self._jsonl_tracker.close(state, reason)
        finally:
            self._outer.sync.end_live(self._folder)
            self._outer.uploader.notify()
