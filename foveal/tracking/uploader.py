"""The thread that delivers: it waits for the store, and nobody waits for it."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveal.tracking.jsonl import Jsonl
from foveal.tracking.store_errors import refusal
from foveal.tracking.sync import Delivery, Superseded
from foveal.tracking.tracker import Row, State, in_words

_PAUSE = 1.0  # seconds between two rounds, so that fast steps share requests
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds between two attempts while the store does not answer
_log = logging.getLogger(__name__)


class Outage:
    """A store that does not answer: one warning when it stops, one line when it is back, ever longer waits between.

    A request that fails alone is not worth a word; the second in a row is. A store that answers no is no outage: what it
    says is said at once, and once.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since: float | None = None
        self._warned = False
        self.refusal: str | None = None  # of the last attempt
        self._wait = _SHORTEST
        self._next = 0.0

    def met(self, error: Exception, began: float) -> None:
        """An attempt that began at a time (monotonic) failed."""
        before, self.refusal = self.refusal, refusal(error)
        alone = self._since is None
        if self._since is None:
            self._since, self._wait = began, _SHORTEST
        if self.refusal is not None and self.refusal != before:
            self._warned = True
            _log.warning(
                "tracking: %s refuses: %s (metrics.jsonl has every number, and it is tried again now and then)",
                self._what,
                self.refusal,
            )
        elif not alone and not self._warned:
            self._warned = True
            _log.warning(
                "tracking: %s does not answer (%s); metrics.jsonl has every number, and it is tried again and again",
                self._what,
                in_words(error),
            )
        self._next = time.monotonic() + self._wait * random.uniform(0.5, 1.0)  # noqa: S311 - a thousand runs should not knock at once
        self._wait = min(2 * self._wait, _LONGEST)

    def over(self, behind: str) -> None:
        """An attempt went well; what had waited for it, in words."""
        self._since, self._next, self.refusal = None, 0.0, None
        if self._warned:
            self._warned = False
            _log.info("tracking: %s answers again; %s were behind", self._what, behind)

    @property
    def wait(self) -> float:
        """Seconds to the next attempt."""
        return max(0.0, self._next - time.monotonic())

    @property
    def lasts(self) -> float:
        """Seconds since the store last answered; 0 while it does."""
        return 0.0 if self._since is None else time.monotonic() - self._since


class Courier:
    """Delivers a run directory until it is closed and everything is there, or in vain for ``patience`` seconds.

    ``store`` is what a message calls the store. Nothing is raised into the training, and the thread dies with it.
    """

    def __init__(self, delivery: Delivery, run: Path, store: str, patience: float) -> None:
        self.delivery = delivery
        self.done = False  # everything is delivered, or is another attempt's to deliver
        self._run, self.patience = run, patience
        self._rows, self._files = Outage(f"MLflow at {store}"), Outage(f"the store of MLflow's files at {store}")
        self._rows_before = self._files_before = 0
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def tell(self) -> None:
        """There is something new in the run directory."""
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Deliver what is left, or say that there is some."""
        self._closing.set()
        self.tell()
        assert self._thread is not None
        self._thread.join(self.patience)
        if not self.done:
            _log.warning(
                "tracking: %d rows of %s, or its files, are not delivered; foveal track sync %s delivers them when MLflow "
                "answers",
                self.delivery.behind(),
                self._run,
                self._run,
            )
        if not self._thread.is_alive():  # else it reads on, and ends with the process
            self.delivery.close()

    def finish(self) -> bool:
        """Deliver everything in the foreground; whether it is there now."""
        self._closing.set()
        self._work()
        self.delivery.close()
        return self.done

    def _work(self) -> None:
        try:
            while not self._round():
                pass
        except Superseded:
            self.done = True
            _log.info("tracking: another attempt has taken %s over; this one delivers nothing more", self._run)

    def _round(self) -> bool:
        """Deliver what is there, and wait for more; True at the end."""
        closing = self._closing.is_set()
        self._news.clear()
        well = self._deliver(self._rows, self._deliver_rows) and self._deliver(self._files, self._deliver_files)
        refused = self._rows.refusal or self._files.refusal  # who answered would say the same again
        if closing and well:
            self.done = True
        elif closing:
            time.sleep(0.0 if refused else min(_SHORTEST, self.patience))
        elif well:
            self._news.wait()
            self._closing.wait(_PAUSE)
        elif self._rows.wait:
            self._closing.wait(self._rows.wait)
        else:
            self._news.wait(self._files.wait)
            self._closing.wait(_PAUSE)
        return closing and bool(well or refused or max(self._rows.lasts, self._files.lasts) >= self.patience)

    def _deliver(self, outage: Outage, deliver: Callable[[], str]) -> bool:
        """Try; whether it went well."""
        if outage.wait and not self._closing.is_set():
            return False
        began = time.monotonic()
        try:
            outage.over(deliver())
        except Superseded:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, it is not worth a run
            self.delivery.forget()
            outage.met(error, began)
            return False
        return True

    def _deliver_rows(self) -> str:
        self.delivery.rows()
        before, self._rows_before = self._rows_before, self.delivery.count.sent + self.delivery.count.there
        return f"{self._rows_before - before} rows"

    def _deliver_files(self) -> str:
        self.delivery.files(last=self._closing.is_set())
        before, self._files_before = self._files_before, self.delivery.count.files
        return f"{self._files_before - before} files"


class Posted:
    """The run directory first, and a courier that takes it from there."""

    def __init__(self, kept: Jsonl, courier: Courier) -> None:
        self._kept, self._courier = kept, courier

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        self._kept.settings(flat, tags)
        self._courier.tell()

    def rows(self, rows: Sequence[Row]) -> None:
        self._kept.rows(rows)
        self._courier.tell()

    def results(self, results: Row, step: int) -> None:
        self._kept.results(results, step)
        self._courier.tell()

    def file(self, path: Path) -> None:
        self._courier.delivery.file(path)
        self._courier.tell()

    def rewind(self, to: int) -> None:
        self._kept.rewind(to)
        self._courier.delivery.rewind()
        self._courier.tell()

    def hurry(self) -> None:
        self._courier.patience = 0.0

    def close(self, state: State, why: str = "") -> None:
        try:
            self._kept.close(state, why)
        finally:
            self._courier.close()
