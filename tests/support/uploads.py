"""Attempts at a run that are uploaded to a fake store, and waits for what their uploaders do."""

import time
from collections.abc import Callable
from pathlib import Path

from fake_store import Kept
from points import row

from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.sync import MetricsFileReplaced, RunSync
from foveal.tracking.uploader import Uploader, UploadingTracker

WAIT = 60  # seconds until a thread is done on a busy machine


def opened(run: Path, store: Kept, start: int = 0, patience: float = WAIT) -> UploadingTracker:
    """Begin an attempt."""
    kept = JsonlTracker(run, start)
    store.written.append(kept)
    return UploadingTracker(kept, Uploader(RunSync(run, kept.open_tail(), store.connected), run, "here", patience))


def train(tracker: UploadingTracker, first: int, last: int, report: int = 5) -> None:
    """Write the rows of some steps, and one of results: all in all one more than steps."""
    tracker.log_settings({"seed": 3}, {"ranks": "1"})
    for step in range(first, last + 1):
        tracker.log_rows([row(step) | ({"images_per_second": 7.0} if step % report == 0 else {})])
    tracker.log_results_once({"val_top1": 0.5}, last)


def kill(tracker: UploadingTracker, store: Kept) -> None:
    """End an attempt's uploader at a request, before or after that is carried out: a dead process sends nothing more."""

    def die(_verb: str) -> None:
        raise MetricsFileReplaced  # what it ends at

    thread, before, after = tracker._uploader._thread, store.before, store.after
    store.before = store.after = die
    tracker.log_file(Path(tracker._uploader._run, "settings.json"))  # where nothing else is left to send
    assert thread is not None
    thread.join(WAIT)
    assert not thread.is_alive()
    store.before, store.after = before, after


def deliver(tracker: UploadingTracker, store: Kept, num_rows: int) -> None:
    """Wait until so many rows of an attempt have arrived, and no request is left to make."""
    until(lambda: tracker._uploader._rows_before == num_rows and "settings.json" in store.artifacts)


def until(what: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)
