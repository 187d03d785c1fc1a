"""The background thread that uploads a run directory; training never waits for it."""

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

_ROUND_SECONDS = 1.0  # between two rounds, so that fast steps share requests
_MIN_WAIT, _MAX_WAIT = 1.0, 60.0  # seconds between two tries while the store does not answer
_log = logging.getLogger(__name__)


class OutageBackoff:
    """Growing pauses while a store does not answer, one warning at the start of an outage and one line at its end.

    A single failed request is not logged; the second in a row is. A refusal is no outage: its reason is logged at once,
    and once.
    """

    def __init__(self, store_name: str) -> None:
        self._store_name = store_name
        self._failing_since: float | None = None
        self._warned = False
        self.last_refusal: str | None = None  # of the last try
        self._wait = _MIN_WAIT
        self._retry_at = 0.0

    def record_failure(self, error: Exception, started_monotonic: float) -> None:
        """Record that a try which began at ``started`` (monotonic seconds) failed."""
        previous_refusal, self.last_refusal = self.last_refusal, explain_refusal(error)
        is_first = self._failing_since is None
        if self._failing_since is None:
            self._failing_since, self._wait = started_monotonic, _MIN_WAIT
        if self.last_refusal is not None and self.last_refusal != previous_refusal:
            self._warned = True
            _log.warning(
                "tracking: %s refuses: %s (metrics.jsonl has every number, and it is tried again now and then)",
                self._store_name,
                self.last_refusal,
            )
        elif not is_first and not self._warned:
            self._warned = True
            _log.warning(
                "tracking: %s does not answer (%s); metrics.jsonl has every number, and it is tried again and again",
                self._store_name,
                summarize_error(error),
            )
        # Jitter: a thousand runs should not retry at the same moment.
        self._retry_at = time.monotonic() + self._wait * random.uniform(0.5, 1.0)  # noqa: S311
        self._wait = min(2 * self._wait, _MAX_WAIT)

    def record_success(self, delivered_text: str) -> None:
        """Record a successful try; ``delivered_text`` says in words what it delivered."""
        self._failing_since, self._retry_at, self.last_refusal = None, 0.0, None
        if self._warned:
            self._warned = False
            _log.info("tracking: %s answers again; %s were behind", self._store_name, delivered_text)

    @property
    def seconds_until_retry(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._retry_at - time.monotonic())

    @property
    def outage_seconds(self) -> float:
        """Seconds since the store last answered; 0 while it does."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since


class Uploader:
    """Uploads a run directory until it is closed and everything has arrived, or ``flush_timeout`` seconds have passed.

    Nothing is raised into the training, and the thread is a daemon. ``store_name`` stands in log lines.
    """

    def __init__(self, sync: RunSync, run_dir: Path, store_name: str, flush_timeout: float) -> None:
        self.sync = sync
        self.is_done = False  # everything has arrived, or another attempt uploads it
        self._run, self.flush_timeout = run_dir, flush_timeout
        self._row_backoff = OutageBackoff(f"MLflow at {store_name}")
        self._file_backoff = OutageBackoff(f"the store of MLflow's files at {store_name}")
        self._rows_before = self._files_before = 0
        self._has_news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def notify(self) -> None:
        """Wake the thread: the run directory has something new. The first call starts the thread."""
        self._has_news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Upload the rest within ``flush_timeout``, or log that some is left."""
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
        if not self._thread.is_alive():  # a thread that still reads ends with the process
            self.sync.close()

    def upload_all_and_close(self) -> bool:
        """Upload everything in the foreground; return whether all has arrived."""
        self._closing.set()
        self._work()
        self.sync.close()
        return self.is_done

    def _work(self) -> None:
        try:
            while not self._run_round():
                pass
        except MetricsFileReplaced:
            self.is_done = True
            _log.info("tracking: another attempt has taken %s over; this one delivers nothing more", self._run)

    def _run_round(self) -> bool:
        """Upload what is there and wait for more; return True at the end."""
        closing = self._closing.is_set()
        self._has_news.clear()
        succeeded = self._try_upload(self._row_backoff, self._upload_rows) and self._try_upload(
            self._file_backoff, self._upload_files
        )
        # A store that refused would refuse again: the end of a run does not wait for it.
        refused = self._row_backoff.last_refusal or self._file_backoff.last_refusal
        if closing and succeeded:
            self.is_done = True
        elif closing:
            time.sleep(0.0 if refused else min(_MIN_WAIT, self.flush_timeout))
        elif succeeded:
            self._has_news.wait()
            self._closing.wait(_ROUND_SECONDS)
        elif self._row_backoff.seconds_until_retry:
            self._closing.wait(self._row_backoff.seconds_until_retry)
        else:
            self._has_news.wait(self._file_backoff.seconds_until_retry)
            self._closing.wait(_ROUND_SECONDS)
        outage_seconds = max(self._row_backoff.outage_seconds, self._file_backoff.outage_seconds)
        return closing and bool(succeeded or refused or outage_seconds >= self.flush_timeout)

    def _try_upload(self, backoff: OutageBackoff, upload: Callable[[], str]) -> bool:
        """Run one upload unless its pause is not over; return whether it succeeded."""
        if backoff.seconds_until_retry and not self._closing.is_set():
            return False
        started = time.monotonic()
        try:
            backoff.record_success(upload())
        except MetricsFileReplaced:
            raise
        except Exception as error:  # noqa: BLE001 - nothing that a tracking server does may end a run
            self.sync.reset_connection()
            backoff.record_failure(error, started)
            return False
        return True

    def _upload_rows(self) -> str:
        self.sync.upload_rows_and_tags()
        rows_before = self._rows_before
        self._rows_before = self.sync.counts.rows_sent + self.sync.counts.rows_already_stored
        return f"{self._rows_before - rows_before} rows"

    def _upload_files(self) -> str:
        self.sync.upload_files(final=self._closing.is_set())
        files_before = self._files_before
        self._files_before = self.sync.counts.files_sent
        return f"{self._files_before - files_before} files"


class UploadingTracker:
    """Writes to the run directory and wakes the uploader."""

    def __init__(self, jsonl_tracker: JsonlTracker, uploader: Uploader) -> None:
        self._jsonl_tracker, self._uploader = jsonl_tracker, uploader

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str], changed: Sequence[str] = ()) -> None:
        self._jsonl_tracker.log_settings(settings, tags, changed)
        self._uploader.notify()

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        self._jsonl_tracker.log_rows(rows)
        self._uploader.notify()

    def log_results_once(self, results: MetricRow, step: int) -> None:
        self._jsonl_tracker.log_results_once(results, step)
        self._uploader.notify()

    def log_file(self, path: Path) -> None:
        self._uploader.sync.queue_file(path)
        self._uploader.notify()

    def rewind(self, to_step: int) -> None:
        self._jsonl_tracker.rewind(to_step)
        self._uploader.sync.on_rewind()
        self._uploader.notify()

    def skip_flush(self) -> None:
        self._uploader.flush_timeout = 0.0

    def close(self, state: AttemptState, reason: str = "") -> None:
        try:
            self._jsonl_tracker.close(state, reason)
        finally:
            self._uploader.close()
