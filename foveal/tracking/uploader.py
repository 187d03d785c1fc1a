"""The thread that delivers: it waits for the store, and nobody waits for it."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.store_errors import explain_refusal
from foveal.tracking.sync import MetricsFileReplaced, RunSync
from foveal.tracking.tracker import AttemptState, MetricRow, summarize_error

_PAUSE = 1.0  # seconds between two rounds, so that fast steps share requests
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds between two attempts while the store does not answer
_log = logging.getLogger(__name__)


class OutageBackoff:
    """A store that does not answer: one warning when it stops, one line when it is back, ever longer waits between.

    A request that fails alone is not worth a word; the second in a row is. A store that answers no is no outage: what it
    says is said at once, and once.
    """

    def __init__(self, store_name: str) -> None:
        self._what = store_name
        self._since: float | None = None
        self._warned = False
        self.last_refusal: str | None = None  # of the last attempt
        self._wait = _SHORTEST
        self._next = 0.0

    def record_failure(self, error: Exception, started: float) -> None:
        """An attempt that began at a time (monotonic) failed."""
        before, self.last_refusal = self.last_refusal, explain_refusal(error)
        alone = self._since is None
        if self._since is None:
            self._since, self._wait = started, _SHORTEST
        if self.last_refusal is not None and self.last_refusal != before:
            self._warned = True
            _log.warning(
                "tracking: %s refuses: %s (metrics.jsonl has every number, and it is tried again now and then)",
                self._what,
                self.last_refusal,
            )
        elif not alone and not self._warned:
            self._warned = True
            _log.warning(
                "tracking: %s does not answer (%s); metrics.jsonl has every number, and it is tried again and again",
                self._what,
                summarize_error(error),
            )
        self._next = time.monotonic() + self._wait * random.uniform(0.5, 1.0)  # noqa: S311 - a thousand runs should not knock at once
        self._wait = min(2 * self._wait, _LONGEST)

    def record_success(self, backlog: str) -> None:
        """An attempt went well; what had waited for it, in words."""
        self._since, self._next, self.last_refusal = None, 0.0, None
        if self._warned:
            self._warned = False
            _log.info("tracking: %s answers again; %s were behind", self._what, backlog)

    @property
    def seconds_until_retry(self) -> float:
        """Seconds to the next attempt."""
        return max(0.0, self._next - time.monotonic())

    @property
    def outage_seconds(self) -> float:
        """Seconds since the store last answered; 0 while it does."""
        return 0.0 if self._since is None else time.monotonic() - self._since


class Uploader:
    """Delivers a run directory until it is closed and everything is there, or in vain for ``patience`` seconds.

    ``store`` is what a message calls the store. Nothing is raised into the training, and the thread dies with it.
    """

    def __init__(self, sync: RunSync, run_dir: Path, store_name: str, flush_timeout: float) -> None:
        self.sync = sync
        self.is_done = False  # everything is delivered, or is another attempt's to deliver
        self._run, self.flush_timeout = run_dir, flush_timeout
        self._rows, self._files = (
            OutageBackoff(f"MLflow at {store_name}"),
            OutageBackoff(f"the store of MLflow's files at {store_name}"),
        )
        self._rows_before = self._files_before = 0
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def notify(self) -> None:
        """There is something new in the run directory."""
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Deliver what is left, or say that there is some."""
        self._closing.set()
        self.notify()
        assert self._thread is not None
        self._thread.join(self.flush_timeout)
        if not self.is_done:
            _log.warning(
                "tracking: %d rows of %s, or its files, are not delivered; foveal track sync %s delivers them when MLflow "
                "answers",
                self.sync.count_pending_rows(),
                self._run,
                self._run,
            )
        if not self._thread.is_alive():  # else it reads on, and ends with the process
            self.sync.close()

    def upload_all(self) -> bool:
        """Deliver everything in the foreground; whether it is there now."""
        self._closing.set()
        self._work()
        self.sync.close()
        return self.is_done

    def _work(self) -> None:
        try:
            while not self._round():
                pass
        except MetricsFileReplaced:
            self.is_done = True
            _log.info("tracking: another attempt has taken %s over; this one delivers nothing more", self._run)

    def _round(self) -> bool:
        """Deliver what is there, and wait for more; True at the end."""
        closing = self._closing.is_set()
        self._news.clear()
        well = self._deliver(self._rows, self._deliver_rows) and self._deliver(self._files, self._deliver_files)
        refused = self._rows.last_refusal or self._files.last_refusal  # who answered would say the same again
        if closing and well:
            self.is_done = True
        elif closing:
            time.sleep(0.0 if refused else min(_SHORTEST, self.flush_timeout))
        elif well:
            self._news.wait()
            self._closing.wait(_PAUSE)
        elif self._rows.seconds_until_retry:
            self._closing.wait(self._rows.seconds_until_retry)
        else:
            self._news.wait(self._files.seconds_until_retry)
            self._closing.wait(_PAUSE)
        return closing and bool(
            well or refused or max(self._rows.outage_seconds, self._files.outage_seconds) >= self.flush_timeout
        )

    def _deliver(self, outage: OutageBackoff, deliver: Callable[[], str]) -> bool:
        """Try; whether it went well."""
        if outage.seconds_until_retry and not self._closing.is_set():
            return False
        began = time.monotonic()
        try:
            outage.record_success(deliver())
        except MetricsFileReplaced:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, it is not worth a run
            self.sync.reset_connection()
            outage.record_failure(error, began)
            return False
        return True

    def _deliver_rows(self) -> str:
        self.sync.upload_rows()
        before, self._rows_before = self._rows_before, self.sync.counts.rows_sent + self.sync.counts.rows_present
        return f"{self._rows_before - before} rows"

    def _deliver_files(self) -> str:
        self.sync.upload_files(final=self._closing.is_set())
        before, self._files_before = self._files_before, self.sync.counts.files_sent
        return f"{self._files_before - before} files"


class Uploaded:
    """The run directory first, and a courier that takes it from there."""

    def __init__(self, jsonl_tracker: JsonlTracker, uploader: Uploader) -> None:
        self._kept, self._courier = jsonl_tracker, uploader

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str]) -> None:
        self._kept.log_settings(settings, tags)
        self._courier.notify()

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        self._kept.log_rows(rows)
        self._courier.notify()

    def log_results(self, results: MetricRow, step: int) -> None:
        self._kept.log_results(results, step)
        self._courier.notify()

    def log_file(self, path: Path) -> None:
        self._courier.sync.queue_file(path)
        self._courier.notify()

    def rewind(self, to_step: int) -> None:
        self._kept.rewind(to_step)
        self._courier.sync.on_rewind()
        self._courier.notify()

    def skip_flush(self) -> None:
        self._courier.flush_timeout = 0.0

    def close(self, state: AttemptState, reason: str = "") -> None:
        try:
            self._kept.close(state, reason)
        finally:
            self._courier.close()
