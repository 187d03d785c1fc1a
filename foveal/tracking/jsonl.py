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

from foveal.atomic import Growing, dispensable, force, write_json
from foveal.redact import redact
from foveal.tracking.tail import Tail, is_named, milliseconds, read_lines
from foveal.tracking.tracker import Row, State


class Jsonl:
    """Writes for one attempt. Rows past the step that it begins at are void, and are dropped when it is opened.

    The file is replaced when it is opened, always: an earlier attempt that still runs somewhere writes on into a file
    that has no name any more, and finds out that it is superseded.
    """

    def __init__(self, run: Path, start: int, attempt: int = 0, fence: Callable[[], None] = lambda: None) -> None:
        """``fence`` is asked last, and raises where a later attempt has taken the file."""
        self._run, self._file = run, run / "metrics.jsonl"
        self.last: Row = {}
        self._results: set[tuple[float, frozenset[str]]] = set()
        went_back = (milliseconds(entry["time"]) for entry in read_lines(run / "rollbacks.jsonl"))
        self._latest = max(went_back, default=0) + 1
        run.mkdir(parents=True, exist_ok=True)
        draft = run / f".metrics.jsonl.{attempt}.draft"
        with draft.open("wb") as stream:
            for row in read_lines(self._file):
                if row["step"] <= start:
                    stream.write(_line(row))
                    self._remember(row)
        self._stream = FileIO(draft, "a+b")
        self._lines = Growing(self._file, self._stream)
        os.fsync(self._stream.fileno())
        try:
            fence()
        except BaseException:
            self._stream.close()
            draft.unlink()
            raise
        draft.replace(self._file)
        force(run)

    def tail(self) -> Tail:
        """For the courier: the rows of this attempt's own file, whatever has its name later."""
        return Tail(os.dup(self._stream.fileno()), self._file)

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        write_json(self._run / "settings.json", flat)
        write_json(self._run / "tags.json", {**{name: redact(tag) for name, tag in tags.items()}, "state": "running"})

    def rows(self, rows: Sequence[Row]) -> None:
        """On disk when this returns: a checkpoint may follow. Where the disk is full, with the next ones that find room.

        Errors: OSError where the file cannot be written for another reason.
        """
        now = self._now()
        self._lines.add(b"".join(_line({**row, "time": now}) for row in rows))

    def results(self, results: Row, step: int) -> None:
        """A row of their own, unless an attempt that was killed right after has left the same."""
        row = {"step": step, **results}
        if _place(row) not in self._results:
            self._results.add(_place(row))
            self.rows([row])

    def file(self, path: Path) -> None:
        """Nothing: the file is in the run directory."""

    def hurry(self) -> None:
        """Nothing: the disk is not waited for."""

    def rewind(self, to: int) -> None:
        """The open file is cut, not replaced: a superseded attempt that goes back must not touch the run's rows."""
        kept, self.last, self._results = 0, {}, set()
        for row in read_lines(self._stream.fileno()):
            if row["step"] <= to:
                self._remember(row)
                kept += len(_line(row))
        os.ftruncate(self._stream.fileno(), kept)
        owed = [row for row in map(json.loads, self._lines.owed.splitlines()) if row["step"] <= to]
        self._lines.owed = b"".join(map(_line, owed))
        self._lines.add(b"")
        self._latest = max(self._latest, milliseconds(time.time())) + 1  # tells what follows from what is void

    def close(self, state: State, why: str = "") -> None:
        tags = self._run / "tags.json"
        mine = is_named(self._stream.fileno(), self._file)
        self._lines.close()
        if mine and tags.exists():
            with dispensable(tags):
                write_json(tags, json.loads(tags.read_text()) | {"state": state, "why_stopped": redact(why) or state})

    def _remember(self, row: Row) -> None:
        if "loss" in row:
            self.last = {name: value for name, value in row.items() if name != "time"}
        else:
            self._results.add(_place(row))

    def _now(self) -> float:
        """Unix seconds to the millisecond, which is what a store keeps; never earlier than before."""
        self._latest = max(self._latest, milliseconds(time.time()))
        return self._latest / 1000


def read_rows(file: Path) -> list[Row]:
    """The rows of a metrics.jsonl without ``time``, which is when they were written and no part of what was trained."""
    return [{name: value for name, value in row.items() if name != "time"} for row in read_lines(file)]


def _place(row: Row) -> tuple[float, frozenset[str]]:
    """What a row of results is about: its step and its names."""
    return row["step"], frozenset(row.keys() - {"time"})


def _line(row: Row) -> bytes:
    return f"{json.dumps(row)}\n".encode()
