"""Upload of a run directory to a store: in order, and each value once, whatever fails on the way.

A row is sent in one request, so it arrives completely or not at all. After every start and every failure the store is
asked what has arrived. Equal rows carry equal timestamps, so a request that was believed lost and arrives after its
repetition changes nothing in a store that keeps a point once.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foveal.tracking.mlflow_names import name_metrics
from foveal.tracking.node_rows import NodeRows
from foveal.tracking.sync_facts import FactsSync, RemoteFacts
from foveal.tracking.tail import MetricsTail, read_json_or_empty, read_step_rows, to_milliseconds
from foveal.tracking.tracker import MetricPoint, MetricRow

_MAX_VALUES = 1000  # per request: MLflow's limit
_FILES = ("config.yaml", "settings.json", "finished.json", "export/card.json")
# Growing files are sent at the end of the run, and earlier whenever they have grown by a factor, so that a run of any
# length sends a few times their size at most.
_GROWING_FILES = ("rollbacks.jsonl", "refused.jsonl", "quarantine.jsonl", "stragglers.jsonl")
_GROWTH_FACTOR = 1.25


class RemoteRun(Protocol):
    """A run in a tracking store. Every method may raise whatever the store's library raises."""

    @property
    def run_id(self) -> str:
        """The store's id of the run."""
        ...

    @property
    def facts(self) -> RemoteFacts:
        """What the store can know of the run beside rows, params, tags and files."""
        ...

    def get_latest_steps(self) -> dict[str, int]:
        """Return the highest step of each metric."""
        ...

    def get_step_timestamps(self, metric_name: str) -> dict[int, int]:
        """Return the newest timestamp of a metric in milliseconds, by step."""
        ...

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Log at most a thousand points in one request: all or none arrive."""
        ...

    def set_params_tags_status(
        self, settings: Mapping[str, Any], tags: Mapping[str, str], changed: Sequence[str] | None = None
    ) -> None:
        """Set the settings that matter as params, and the tags, which include the state.

        changed: names of the settings that matter beside a core of them; None: all matter.
        """
        ...

    def list_files(self) -> dict[str, int]:
        """Return the stored files of the run, as ``pictures/a.png``, and their sizes in bytes."""
        ...

    def upload_file(self, path: Path, remote_folder: str) -> None:
        """Upload a file to a folder of the run's files; an empty name is the top folder."""
        ...


class MetricsFileReplaced(Exception):
    """Another attempt has replaced the run's file of rows. This is no failure of the store."""


@dataclass
class SyncCounts:
    """Rows sent, rows that the store had already, and files sent."""

    rows_sent: int = 0
    rows_already_stored: int = 0
    files_sent: int = 0


class RunSync:
    """Uploads one run directory to one store.

    ``upload_rows_and_tags`` and ``upload_files`` run in the uploader's thread, ``queue_file`` and ``on_rewind`` in the training's.
    """

    def __init__(
        self, run_dir: Path, tail: MetricsTail, connect: Callable[[], RemoteRun], facts: FactsSync | None = None
    ) -> None:
        self.counts = SyncCounts()
        self.given_up: set[Path] = set()  # nested runs that cannot be read
        self._facts_sync = facts
        self._run, self._tail, self._connect = run_dir, tail, connect
        self._store: RemoteRun | None = None
        self._synced_run = self._compared_run = ""  # ids: the run with the delivered rows, the run with compared files
        self._sent_facts: Any = None
        self._remote = RemoteState({})
        self._rolled_back = False
        self._nodes = NodeRows(run_dir)
        self._queue: deque[Path] = deque()
        self._sent_sizes: dict[Path, int] = {}  # bytes of the growing files when they were last sent

    def queue_file(self, path: Path) -> None:
        """Queue a file for upload, whatever the store has of that name."""
        self._queue.append(path)

    def on_rewind(self) -> None:
        """Note that the file of rows was truncated."""
        self._rolled_back = True
        self._tail.on_truncated()

    def count_pending_rows(self) -> int:
        """Count the rows that are not delivered yet."""
        return self._tail.count_pending_rows()

    def reset_connection(self) -> None:
        """Reconnect at the next upload, and ask the store again what has arrived."""
        self._store = None

    def upload_rows_and_tags(self) -> None:
        """Upload settings, tags and rows.

        Raises: MetricsFileReplaced; whatever the store raises, after which ``reset_connection`` is due.
        """
        self._upload_rows()
        self._send_run_facts()

    def _upload_rows(self) -> None:
        store = self._connect_once()
        if self._read_tags()["state"] == "running":
            self._send_facts(store)
        while (batch := self._tail.read_batch(_MAX_VALUES)).rows:
            self._check_not_replaced()
            if self._rolled_back:
                self._rolled_back = False
                self._remote.rollback_ms_and_steps = _read_rollbacks(self._run)
            self._remote.learn_metric_groups(batch.rows)
            missing = [points for row in batch.rows if (points := self._remote.find_missing_points(row, store))]
            if missing:
                store.log_points([point for points in missing for point in points])
            self.counts.rows_sent += len(missing)
            self.counts.rows_already_stored += len(batch.rows) - len(missing)
            self._tail.mark_delivered(batch)
        self._nodes.upload(store)
        self._send_facts(store)

    def _send_run_facts(self) -> None:
        """Send data sets, input models and so on: behind all rows, because a store may fail at one of them for long."""
        if self._facts_sync is not None:
            self._facts_sync.send_facts(self._connect_once().facts)

    def upload_files(self, *, final: bool) -> None:
        """Upload files, with ``final`` also those that have grown only a little. Raises: as ``upload_rows_and_tags``."""
        store = self._connect_once()
        if self._compared_run != self._synced_run:
            self._queue.extend(_list_files_to_upload(self._run, store.list_files()))
            self._compared_run, self._sent_sizes = self._synced_run, {}
        self._queue.extend(self._list_grown_files(1.0 if final else _GROWTH_FACTOR))
        while self._queue:
            path = self._queue[0]
            if path.exists():
                self._check_not_replaced()
                store.upload_file(path, _remote_folder(path))
                self.counts.files_sent += 1
            self._queue.popleft()
        if self._facts_sync is not None:
            self._check_not_replaced()
            self._facts_sync.send_models(store.facts)

    def _list_grown_files(self, factor: float) -> list[Path]:
        """List the growing files that are ``factor`` times as long as when they were last sent."""
        grown = []
        for file in (self._run / name for name in _GROWING_FILES):
            size = file.stat().st_size if file.exists() else 0
            if size > factor * self._sent_sizes.get(file, 0) and file not in self._queue:
                self._sent_sizes[file] = size
                grown.append(file)
        return grown

    def close(self) -> None:
        """Close the file of rows."""
        self._tail.close()

    def _connect_once(self) -> RemoteRun:
        self._check_not_replaced()
        if self._store is None:
            store = self._connect()
            if store.run_id != self._synced_run:  # the first connection, or the store has lost the run
                self._tail.restart()
            latest_steps = store.get_latest_steps()
            self._remote = RemoteState(latest_steps)
            self._nodes.on_connected(store.run_id, latest_steps)
            self._synced_run = store.run_id
            self._sent_facts = None
            if self._facts_sync is not None:
                self._facts_sync.reset()
            self._rolled_back = True
            self._store = store
        return self._store

    def _check_not_replaced(self) -> None:
        if self._tail.is_replaced:
            raise MetricsFileReplaced

    def _read_tags(self) -> dict[str, str]:
        return read_json_or_empty(self._run / "tags.json") or {"state": "running"}

    def _send_facts(self, store: RemoteRun) -> None:
        changed = read_json_or_empty(self._run / "changed_settings.json").get("names", ())
        facts = read_json_or_empty(self._run / "settings.json"), self._read_tags(), changed
        if facts != self._sent_facts:
            store.set_params_tags_status(*facts)
            self._sent_facts = facts


class RemoteState:
    """What a store had at the last connection, asked for with as few requests as decide which points are missing.

    Metrics that always occur in the same rows arrived together, so one representative of them is asked for. A point older
    than a roll-back to before its step does not count. ``rollbacks``: (milliseconds, step the run went back to).
    """

    def __init__(self, latest_step_by_metric: Mapping[str, int]) -> None:
        self.rollback_ms_and_steps: list[tuple[int, int]] = []
        self._latest_steps, self._last_step = latest_step_by_metric, max(latest_step_by_metric.values(), default=-1)
        self._row_kinds: set[frozenset[str]] = set()  # the metric names of each kind of row
        self._representatives: dict[str, str] = {}
        self._timestamps: dict[str, dict[int, int]] = {}

    def learn_metric_groups(self, rows: Sequence[MetricRow]) -> None:
        """Learn which metrics occur in the same rows, and choose their representatives."""
        row_kinds = {frozenset(name_metrics(row)) for row in rows}
        if not row_kinds <= self._row_kinds:
            self._row_kinds |= row_kinds
            first_names: dict[tuple[Any, ...], str] = {}
            for name in sorted(set().union(*self._row_kinds)):
                group = frozenset(kind for kind in self._row_kinds if name in kind), self._latest_steps.get(name)
                self._representatives[name] = first_names.setdefault(group, name)
        if rows[0]["step"] > self._last_step:
            self._timestamps.clear()  # a long run has a million of them, and needs none any more

    def find_missing_points(self, row: MetricRow, store: RemoteRun) -> list[MetricPoint]:
        """Return the points of a row that the store does not have. Raises: whatever the store raises."""
        step, timestamp = int(row["step"]), to_milliseconds(row["time"])
        return [
            (name, value, timestamp, step)
            for name, value in name_metrics(row).items()
            if not self._has(name, step, store)
        ]

    def _has(self, name: str, step: int, store: RemoteRun) -> bool:
        if self._latest_steps.get(name, -1) < step:
            return False
        representative = self._representatives[name]
        if representative not in self._timestamps:
            self._timestamps[representative] = store.get_step_timestamps(representative)
        timestamp = self._timestamps[representative].get(step)
        last_rollback = max((at for at, to_step in self.rollback_ms_and_steps if to_step < step), default=-1)
        return timestamp is not None and timestamp > last_rollback


def _read_rollbacks(run_dir: Path) -> list[tuple[int, int]]:
    return [(to_milliseconds(entry["time"]), entry["to"]) for entry in read_step_rows(run_dir / "rollbacks.jsonl")]


def _list_files_to_upload(run_dir: Path, stored_sizes: Mapping[str, int]) -> list[Path]:
    """List the small files, and the pictures of which the store has no copy of the same size."""
    pictures = sorted(run_dir.glob("pictures/*.png"))
    new = [picture for picture in pictures if stored_sizes.get(f"pictures/{picture.name}") != picture.stat().st_size]
    return [run_dir / name for name in _FILES] + sorted(run_dir.glob("export/*/card.json")) + new


def _remote_folder(path: Path) -> str:
    """Return the store's folder of a file: pictures and the cards of several exports have folders of their own."""
    is_named_export = path.name == "card.json" and path.parent.parent.name == "export"
    return path.parent.name if is_named_export or path.parent.name == "pictures" else ""
