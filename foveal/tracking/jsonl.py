"""What a run says of itself in its own directory, before anything else hears of it.

``metrics.jsonl``  one JSON object a step or evaluation, each with ``time``, the unix seconds at which it was written
``settings.json``  every setting, ``dotted.key`` to value
``tags.json``      facts about the newest attempt, its ``state`` and, once it has ended, ``why_stopped``
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
from foveal.tracking.tail import MetricsTail, is_same_file, read_json_lines, to_milliseconds
from foveal.tracking.tracker import AttemptState, MetricRow


class JsonlTracker:
    """Writes for one attempt. Rows past the step that it begins at are void, and are dropped when it is opened.

    The file is replaced when it is opened, always: an earlier attempt that still runs somewhere writes on into a file
    that has no name any more, and finds out that it is superseded.
    """

    def __init__(
        self, run_dir: Path, start_step: int, attempt: int = 0, check_lease: Callable[[], None] = lambda: None
    ) -> None:
        """``fence`` is asked last, and raises where a later attempt has taken the file."""
        self._run, self._file = run_dir, run_dir / "metrics.jsonl"
        self.last_row: MetricRow = {}
        self._results: set[tuple[float, frozenset[str]]] = set()
        went_back = (to_milliseconds(entry["time"]) for entry in read_json_lines(run_dir / "rollbacks.jsonl"))
        self._latest = max(went_back, default=0) + 1
        run_dir.mkdir(parents=True, exist_ok=True)
        draft = run_dir / f".metrics.jsonl.{attempt}.draft"
        with draft.open("wb") as stream:
            for row in read_json_lines(self._file):
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
        """For the courier: the rows of this attempt's own file, whatever has its name later."""
        return MetricsTail(os.dup(self._stream.fileno()), self._file)

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str]) -> None:
        write_json(self._run / "settings.json", settings)
        write_json(self._run / "tags.json", {**{name: redact(tag) for name, tag in tags.items()}, "state": "running"})

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        """On disk when this returns: a checkpoint may follow. Where the disk is full, with the next ones that find room.

        Raises: OSError where the file cannot be written for another reason.
        """
        now = self._now()
        self._lines.append(b"".join(_encode_row({**row, "time": now}) for row in rows))

    def log_results(self, results: MetricRow, step: int) -> None:
        """A row of their own, unless an attempt that was killed right after has left the same."""
        row = {"step": step, **results}
        if _results_key(row) not in self._results:
            self._results.add(_results_key(row))
            self.log_rows([row])

    def log_file(self, path: Path) -> None:
        """Nothing: the file is in the run directory."""

    def skip_flush(self) -> None:
        """Nothing: the disk is not waited for."""

    def rewind(self, to_step: int) -> None:
        """The open file is cut, not replaced: a superseded attempt that goes back must not touch the run's rows."""
        kept, self.last_row, self._results = 0, {}, set()
        for row in read_json_lines(self._stream.fileno()):
            if row["step"] <= to_step:
                self._remember(row)
                kept += len(_encode_row(row))
        os.ftruncate(self._stream.fileno(), kept)
        owed = [row for row in map(json.loads, self._lines.pending.splitlines()) if row["step"] <= to_step]
        self._lines.pending = b"".join(map(_encode_row, owed))
        self._lines.append(b"")
        self._latest = max(self._latest, to_milliseconds(time.time())) + 1  # tells what follows from what is void

    def close(self, state: AttemptState, reason: str = "") -> None:
        tags = self._run / "tags.json"
        mine = is_same_file(self._stream.fileno(), self._file)
        self._lines.close()
        if mine and tags.exists():
            with best_effort(tags):
                write_json(
                    tags, json.loads(tags.read_text()) | {"state": state, "why_stopped": redact(reason) or state}
                )

    def _remember(self, row: MetricRow) -> None:
        if "loss" in row:
            self.last_row = {name: value for name, value in row.items() if name != "time"}
        else:
            self._results.add(_results_key(row))

    def _now(self) -> float:
        """Unix seconds to the millisecond, which is what a store keeps; never earlier than before."""
        self._latest = max(self._latest, to_milliseconds(time.time()))
        return self._latest / 1000


def read_metric_rows(file: Path) -> list[MetricRow]:
    """The rows of a metrics.jsonl without ``time``, which is when they were written and no part of what was trained."""
    return [{name: value for name, value in row.items() if name != "time"} for row in read_json_lines(file)]


def _results_key(row: MetricRow) -> tuple[float, frozenset[str]]:
    """What a row of results is about: its step and its names."""
    return row["step"], frozenset(row.keys() - {"time"})


def _encode_row(row: MetricRow) -> bytes:
    return f"{json.dumps(row)}\n".encode()
