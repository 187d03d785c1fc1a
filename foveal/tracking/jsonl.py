"""The tracker that writes to the run directory, before anything is uploaded.

``metrics.jsonl``  one JSON object per step or evaluation, with ``time``: unix seconds of writing
``settings.json``  all settings: ``dotted.key`` to value
``changed_settings.json``  names of the science settings with another value than their default
``tags.json``      tags of the newest attempt, its ``state`` and, once it has ended, ``why_stopped``
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog, best_effort, fsync, write_json
from foveal.redact import redact
from foveal.tracking.tail import MetricsTail, is_same_file, read_step_rows, to_milliseconds
from foveal.tracking.tracker import AttemptState, MetricRow


class JsonlTracker:
    """Tracker of one attempt. Opening it drops the rows after the attempt's first step.

    Opening always replaces the file: an earlier attempt that is still alive writes on into a deleted file and finds out
    that it is superseded.
    """

    def __init__(
        self, run_dir: Path, start_step: int, attempt_number: int = 0, check_lease: Callable[[], None] = lambda: None
    ) -> None:
        """``check_lease`` is called last and raises if a later attempt has taken the run over."""
        self._run, self._file = run_dir, run_dir / "metrics.jsonl"
        self.last_training_row: MetricRow = {}
        self._results: set[tuple[float, frozenset[str]]] = set()
        rollback_times = (to_milliseconds(entry["time"]) for entry in read_step_rows(run_dir / "rollbacks.jsonl"))
        self._latest_ms = max(rollback_times, default=0) + 1
        run_dir.mkdir(parents=True, exist_ok=True)
        draft = run_dir / f".metrics.jsonl.{attempt_number}.draft"
        with draft.open("wb") as stream:
            for row in read_step_rows(self._file):
                if row["step"] <= start_step:
                    stream.write(_encode_row(row))
                    self._remember(row)
        self._stream = FileIO(draft, "a+b")
        self._lines = AppendLog(self._file, self._stream)
        os.fsync(self._stream.fileno())
        try:
            check_lease()
        except BaseException:
            self._stream.close()
            draft.unlink()
            raise
        draft.replace(self._file)
        fsync(run_dir)

    def open_tail(self) -> MetricsTail:
        """Open a reader of this attempt's own file, for the uploader; a later attempt may take over the name."""
        return MetricsTail(os.dup(self._stream.fileno()), self._file)

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str], changed: Sequence[str] = ()) -> None:
        write_json(self._run / "changed_settings.json", {"names": list(changed)})
        write_json(self._run / "settings.json", settings)
        write_json(self._run / "tags.json", {**{name: redact(tag) for name, tag in tags.items()}, "state": "running"})

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        """Write rows and fsync them, so that a checkpoint may follow. On a full disk they wait in memory for the next call.

        Raises: OSError if the file cannot be written for another reason.
        """
        now = self._now()
        self._lines.append(b"".join(_encode_row({**row, "time": now}) for row in rows))

    def log_results_once(self, results: MetricRow, step: int) -> None:
        """Write one row, unless a killed attempt has written a row of the same step and names."""
        row = {"step": step, **results}
        if _results_key(row) not in self._results:
            self._results.add(_results_key(row))
            self.log_rows([row])

    def log_file(self, path: Path) -> None:
        """Do nothing: the file is in the run directory."""

    def skip_flush(self) -> None:
        """Do nothing: the disk is not waited for."""

    def rewind(self, to_step: int) -> None:
        """Truncate the open file. It is not replaced: a superseded attempt must not touch the new attempt's rows."""
        num_bytes, self.last_training_row, self._results = 0, {}, set()
        for row in read_step_rows(self._stream.fileno()):
            if row["step"] <= to_step:
                self._remember(row)
                num_bytes += len(_encode_row(row))
        os.ftruncate(self._stream.fileno(), num_bytes)
        pending = [row for row in map(json.loads, self._lines.pending.splitlines()) if row["step"] <= to_step]
        self._lines.pending = b"".join(map(_encode_row, pending))
        self._lines.append(b"")
        # Later than all dropped rows, so that a store can tell repeated steps from dropped ones.
        self._latest_ms = max(self._latest_ms, to_milliseconds(time.time())) + 1

    def close(self, state: AttemptState, reason: str = "") -> None:
        tags_file = self._run / "tags.json"
        owns_file = is_same_file(self._stream.fileno(), self._file)
        self._lines.close()
        if owns_file and tags_file.exists():
            with best_effort(tags_file):
                tags = json.loads(tags_file.read_text())
                write_json(tags_file, tags | {"state": state, "why_stopped": redact(reason) or state})

    def _remember(self, row: MetricRow) -> None:
        if "loss" in row:
            self.last_training_row = {name: value for name, value in row.items() if name != "time"}
        else:
            self._results.add(_results_key(row))

    def _now(self) -> float:
        """Return unix seconds, rounded to the store's milliseconds and never decreasing."""
        self._latest_ms = max(self._latest_ms, to_milliseconds(time.time()))
        return self._latest_ms / 1000


def read_rows_without_time(file: Path) -> list[MetricRow]:
    """Return the rows of a metrics.jsonl without ``time``, which depends on the clock, not on the training."""
    return [{name: value for name, value in row.items() if name != "time"} for row in read_step_rows(file)]


def _results_key(row: MetricRow) -> tuple[float, frozenset[str]]:
    """Return the step and the names of a row of results."""
    return row["step"], frozenset(row.keys() - {"time"})


def _encode_row(row: MetricRow) -> bytes:
    return f"{json.dumps(row)}\n".encode()
