"""What a run directory holds, taken to a store: in order, and each number once, whatever fails on the way.

A row goes into one request whole, so that it has arrived or has not. What has arrived is the store's to say: after every
failure, and after every start, it is asked anew. Equal rows carry equal times, so that a request which was thought lost
and arrives after its repetition changes nothing in a store that keeps a point once.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foveal.tracking.tail import MetricsTail, read_json_lines, read_json_or_empty, to_milliseconds
from foveal.tracking.tracker import MetricPoint, MetricRow

_NUMBERS = 1000  # in a request: the most that MLflow takes
_FILES = ("config.yaml", "settings.json", "finished.json", "export/card.json")
# These grow: they are sent at the run's end, and before when they have grown by a part, so that a run of any length sends
# no more than some times their size.
_TABLES = ("rollbacks.jsonl", "refused.jsonl", "quarantine.jsonl", "stragglers.jsonl")
_GROWN = 1.25

_ODD = re.compile(r"[^\w.\- :/]")


class RemoteRun(Protocol):
    """A run in a tracking store. Every verb may raise whatever the store's library raises."""

    @property
    def run_id(self) -> str:
        """What the store calls the run."""
        ...

    def get_latest_steps(self) -> dict[str, int]:
        """The highest step of each name."""
        ...

    def get_step_timestamps(self, name: str) -> dict[int, int]:
        """For each step with that name, when its newest number was made, in milliseconds."""
        ...

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """At most a thousand numbers, which arrive together or not at all."""
        ...

    def set_params_and_tags(self, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Settings, tags and with them the state."""
        ...

    def list_files(self) -> dict[str, int]:
        """What is kept of the run's files: ``pictures/a.png`` to its bytes."""
        ...

    def upload_file(self, path: Path, folder: str) -> None:
        """Keep a file, in a folder of the run's files or, where that is empty, beside them."""
        ...


class MetricsFileReplaced(Exception):
    """The run's rows are another attempt's now; this is no failure of the store."""


@dataclass
class SyncCounts:
    """Rows that were sent, rows that the store had, and files that were sent."""

    rows_sent: int = 0
    rows_present: int = 0
    files_sent: int = 0


class RunSync:
    """From one run directory to one store. ``rows`` and ``files`` are one thread's, ``file`` and ``rewind`` another's."""

    def __init__(self, run_dir: Path, tail: MetricsTail, connect: Callable[[], RemoteRun]) -> None:
        self.counts = SyncCounts()
        self._run, self._tail, self._connect = run_dir, tail, connect
        self._store: RemoteRun | None = None
        self._known = self._searched = ""  # the store's run that has what was delivered, and whose files were compared
        self._told: Any = None
        self._asked = RemoteState({})
        self._went_back = False
        self._waiting: deque[Path] = deque()
        self._sizes: dict[Path, int] = {}  # of the tables as they were last sent

    def queue_file(self, path: Path) -> None:
        """To be kept, whatever the store has of that name."""
        self._waiting.append(path)

    def on_rewind(self) -> None:
        """The file of rows was cut."""
        self._went_back = True
        self._tail.on_truncated()

    def count_pending_rows(self) -> int:
        """Rows that are not delivered yet."""
        return self._tail.count_pending_rows()

    def reset_connection(self) -> None:
        """After a failure: what has arrived is to be asked for."""
        self._store = None

    def upload_rows(self) -> None:
        """Deliver settings, tags and rows. Raises: Superseded, and whatever the store raises; then ``forget``."""
        store = self._connected()
        if self._tags()["state"] == "running":
            self._tell(store)
        while (taken := self._tail.read_batch(_NUMBERS)).rows:
            self._fence()
            if self._went_back:
                self._went_back, self._asked.rollbacks = False, _read_rollbacks(self._run)
            self._asked.register_rows(taken.rows)
            missing = [points for row in taken.rows if (points := self._asked.find_missing_points(row, store))]
            if missing:
                store.log_points([point for points in missing for point in points])
            self.counts.rows_sent += len(missing)
            self.counts.rows_present += len(taken.rows) - len(missing)
            self._tail.mark_delivered(taken)
        self._tell(store)

    def upload_files(self, *, final: bool) -> None:
        """Deliver files, the ``last`` time also those that have grown only a little. Raises: as for rows."""
        store = self._connected()
        if self._searched != self._known:
            self._waiting.extend(_list_files_to_upload(self._run, store.list_files()))
            self._searched, self._sizes = self._known, {}
        self._waiting.extend(self._grown(1.0 if final else _GROWN))
        while self._waiting:
            path = self._waiting[0]
            if path.exists():
                self._fence()
                store.upload_file(path, _remote_folder(path))
                self.counts.files_sent += 1
            self._waiting.popleft()

    def _grown(self, by: float) -> list[Path]:
        """The tables that are so many times as long as they were sent."""
        found = []
        for file in (self._run / name for name in _TABLES):
            size = file.stat().st_size if file.exists() else 0
            if size > by * self._sizes.get(file, 0) and file not in self._waiting:
                self._sizes[file] = size
                found.append(file)
        return found

    def close(self) -> None:
        """Read no more."""
        self._tail.close()

    def _connected(self) -> RemoteRun:
        self._fence()
        if self._store is None:
            store = self._connect()
            if store.run_id != self._known:  # the first time, or a store that lost it
                self._tail.restart()
            self._asked = RemoteState(store.get_latest_steps())
            self._known, self._told, self._went_back, self._store = store.run_id, None, True, store
        return self._store

    def _fence(self) -> None:
        if self._tail.is_replaced:
            raise MetricsFileReplaced

    def _tags(self) -> dict[str, str]:
        return read_json_or_empty(self._run / "tags.json") or {"state": "running"}

    def _tell(self, store: RemoteRun) -> None:
        facts = read_json_or_empty(self._run / "settings.json"), self._tags()
        if facts != self._told:
            store.set_params_and_tags(*facts)
            self._told = facts


class RemoteState:
    """What a store had when it was asked: as little is asked as decides about the rows that are to be delivered.

    Names that always come together arrived together: one of them is asked for. A point that was made before the run
    went back behind its step is void, and does not count. ``voids``: (milliseconds, the step gone back to).
    """

    def __init__(self, latest_steps: Mapping[str, int]) -> None:
        self.rollbacks: list[tuple[int, int]] = []
        self._newest, self._end = latest_steps, max(latest_steps.values(), default=-1)
        self._kinds: set[frozenset[str]] = set()
        self._speakers: dict[str, str] = {}
        self._held: dict[str, dict[int, int]] = {}

    def register_rows(self, rows: Sequence[MetricRow]) -> None:
        """Learn which names come together."""
        kinds = {frozenset(_numeric_metrics(row)) for row in rows}
        if not kinds <= self._kinds:
            self._kinds |= kinds
            first: dict[tuple[Any, ...], str] = {}
            for name in sorted(set().union(*self._kinds)):
                company = frozenset(kind for kind in self._kinds if name in kind), self._newest.get(name)
                self._speakers[name] = first.setdefault(company, name)
        if rows[0]["step"] > self._end:
            self._held.clear()  # a long run has a million, and none is asked for again

    def find_missing_points(self, row: MetricRow, store: RemoteRun) -> list[MetricPoint]:
        """Of a row what the store does not have. Raises: whatever the store raises."""
        step, made = int(row["step"]), to_milliseconds(row["time"])
        return [
            (name, value, made, step)
            for name, value in _numeric_metrics(row).items()
            if not self._has(name, step, store)
        ]

    def _has(self, name: str, step: int, store: RemoteRun) -> bool:
        if self._newest.get(name, -1) < step:
            return False
        speaker = self._speakers[name]
        if speaker not in self._held:
            self._held[speaker] = store.get_step_timestamps(speaker)
        made = self._held[speaker].get(step)
        return made is not None and made > max((when for when, to in self.rollbacks if to < step), default=-1)


def _numeric_metrics(row: MetricRow) -> dict[str, float]:
    """A row without its place and time, under names that any store takes: arms of a comparison are a user's words."""
    return {_ODD.sub("_", name): float(value) for name, value in row.items() if name not in ("step", "time")}


def _read_rollbacks(run: Path) -> list[tuple[int, int]]:
    return [(to_milliseconds(entry["time"]), entry["to"]) for entry in read_json_lines(run / "rollbacks.jsonl")]


def _list_files_to_upload(run: Path, there: Mapping[str, int]) -> list[Path]:
    """The run's files that a store is to have: the small ones in any case, a picture if the store has none as large."""
    pictures = sorted(run.glob("pictures/*.png"))
    new = [each for each in pictures if there.get(f"pictures/{each.name}") != each.stat().st_size]
    return [run / name for name in _FILES] + sorted(run.glob("export/*/card.json")) + new


def _remote_folder(path: Path) -> str:
    """Where a store keeps a file of the run: pictures, and cards of several exports, have a folder of their own."""
    several = path.name == "card.json" and path.parent.parent.name == "export"
    return path.parent.name if several or path.parent.name == "pictures" else ""
