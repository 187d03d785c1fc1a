"""A metrics.jsonl, read while it is written: whole lines only, from a place that moves on as they are delivered."""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal import atomic
from foveal.atomic import parse_json_object
from foveal.errors import CheckpointError
from foveal.tracking.tracker import MetricRow

_CHUNK = 1 << 18


def read_json_lines(file: Path | int) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, or of an open one; a last line that a kill cut short did not happen.

    Each is of a step, or of a roll-back to one. Raises: CheckpointError for a line that is no such object.
    """
    if isinstance(file, Path) and not file.exists():
        return
    if isinstance(file, Path) and file.is_dir():
        raise CheckpointError(f"{file} is a folder, and a file is to be there: move it away")
    with open(os.dup(file) if isinstance(file, int) else file, "rb") as stream:  # noqa: PTH123 - or a descriptor
        stream.seek(0)
        for line in stream:
            if line.endswith(b"\n"):
                yield _check_row(parse_json_object(line, _file_name(file)), _file_name(file))


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """An object that was written whole; empty where it was not yet."""
    return atomic.read_json(file) if file.exists() else {}


def _file_name(file: Path | int) -> str:
    return str(file) if isinstance(file, Path) else str(Path(f"/proc/self/fd/{file}").resolve())


def _check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    if type(row.get("step", row.get("to"))) not in (int, float):
        raise CheckpointError(f"{where} is damaged ({str(row)[:60]} is of no step): restore it")
    return row


def to_milliseconds(seconds: float) -> int:
    """A ``time`` as a store keeps it."""
    return round(seconds * 1000)


def is_same_file(descriptor: int, file: Path) -> bool:
    """Whether a name still means an open file: a later attempt gives it to its own."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class RowBatch:
    """Rows that were read, the place behind them, and how often the file had been cut by then."""

    rows: list[MetricRow]
    end_offset: int
    num_truncations: int


class MetricsTail:
    """What is still to be delivered of an open metrics.jsonl. It owns the descriptor."""

    def __init__(self, descriptor: int, file: Path) -> None:
        self._descriptor, self._file = descriptor, file
        self._lock = threading.Lock()
        self._place = 0
        self._cuts: list[int] = []  # to how many bytes

    @property
    def is_replaced(self) -> bool:
        """Whether the run's rows are in another file by now."""
        return not is_same_file(self._descriptor, self._file)

    def read_batch(self, max_values: int) -> RowBatch:
        """The next rows, together of at most so many numbers (but one row whatever it holds); none: all is delivered."""
        while True:
            with self._lock:
                place, cuts = self._place, len(self._cuts)
            lines = self._lines(place)
            rows: list[MetricRow] = []
            room = max_values
            for line in lines:
                row = json.loads(line)
                room -= len(row) - 2  # step and time are none
                if rows and room < 0:
                    break
                rows.append(row)
                place += len(line)
            with self._lock:
                if cuts == len(self._cuts):
                    return RowBatch(rows, place, cuts)

    def mark_delivered(self, batch: RowBatch) -> None:
        """Go on behind these, or where the file was cut meanwhile."""
        with self._lock:
            self._place = min([batch.end_offset, *self._cuts[batch.num_truncations :]])

    def on_truncated(self) -> None:
        """The file is shorter now: the next rows are those behind what is left of it."""
        with self._lock:
            self._cuts.append(os.fstat(self._descriptor).st_size)
            self._place = min(self._place, self._cuts[-1])

    def restart(self) -> None:
        """Begin anew, for a store that has nothing."""
        with self._lock:
            self._place = 0

    def count_pending_rows(self) -> int:
        """Rows that are not delivered."""
        with self._lock:
            place = self._place
        count = 0
        while chunk := os.pread(self._descriptor, _CHUNK, place):
            count, place = count + chunk.count(b"\n"), place + len(chunk)
        return count

    def close(self) -> None:
        os.close(self._descriptor)

    def _lines(self, place: int) -> list[bytes]:
        size = _CHUNK
        while True:
            chunk = os.pread(self._descriptor, size, place)
            whole = chunk[: chunk.rfind(b"\n") + 1]
            if whole or len(chunk) < size:
                return whole.splitlines(keepends=True)
            size *= 2  # one line that is longer
