"""Reading a metrics.jsonl while it is written: complete lines only, from the offset up to which rows are delivered."""

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal import atomic
from foveal.atomic import parse_json_object
from foveal.errors import CheckpointError
from foveal.renames import translate_metrics
from foveal.tracking.tracker import MetricRow

_CHUNK_BYTES = 1 << 18
MAX_TAIL_BYTES = 1 << 20  # some thousand rows
_BACKWARD_CHUNK_BYTES = 1 << 16


def read_step_rows(file_or_descriptor: Path | int) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, given by path or descriptor; an incomplete last line is ignored.

    Every object has a ``step``, or is a roll-back with ``to``. Metrics of 0.1 get their new names. Raises: CheckpointError for any other line.
    """
    if isinstance(file_or_descriptor, Path) and not file_or_descriptor.exists():
        return
    if isinstance(file_or_descriptor, Path) and file_or_descriptor.is_dir():
        raise CheckpointError(f"{file_or_descriptor} is a folder, and a file is to be there: move it away")
    source = os.dup(file_or_descriptor) if isinstance(file_or_descriptor, int) else file_or_descriptor
    with open(source, "rb") as stream:  # noqa: PTH123 - or a descriptor
        stream.seek(0)
        for line in stream:
            if line.endswith(b"\n"):
                name = _file_name(file_or_descriptor)
                yield translate_metrics(_check_row(parse_json_object(line, name), name))


def read_last_rows(file: Path, max_bytes: int = MAX_TAIL_BYTES) -> Iterator[dict[str, Any]]:
    """Yield the newest rows of a file of JSON lines, the newest first, from at most its last ``max_bytes``.

    The file is read backwards from its end, in chunks, as far as rows are taken: its length costs nothing. What is no row
    is passed over: another host may still see zeros where the newest row will be. A missing file has no rows.
    Raises: OSError.
    """
    try:
        stream = file.open("rb", buffering=0)
    except FileNotFoundError:
        return
    with stream:
        end = stream.seek(0, os.SEEK_END)
        first = max(0, end - max_bytes)
        rest = b""  # the beginning of a line whose end was read
        while end > first:
            start = max(first, end - _BACKWARD_CHUNK_BYTES)
            stream.seek(start)
            lines = (stream.read(end - start) + rest).splitlines(keepends=True)
            end = start
            rest = lines.pop(0) if lines and start else b""
            for line in reversed(lines):
                if (row := _parse_row_or_none(line)) is not None:
                    yield row


def _parse_row_or_none(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None for an incomplete or damaged one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) in (int, float) and math.isfinite(row["step"])
    return translate_metrics(row) if is_row else None


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON object that is written atomically; empty if it does not exist yet."""
    return atomic.read_json(file) if file.exists() else {}


def _file_name(file: Path | int) -> str:
    return str(file) if isinstance(file, Path) else str(Path(f"/proc/self/fd/{file}").resolve())


def _check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    if type(row.get("step", row.get("to"))) not in (int, float):
        raise CheckpointError(f"{where} is damaged ({str(row)[:60]} is of no step): restore it")
    return row


def to_milliseconds(seconds: float) -> int:
    """Convert a ``time`` to the unit of a store."""
    return round(seconds * 1000)


def is_same_file(descriptor: int, file: Path) -> bool:
    """Whether a path still leads to an open file: a later attempt replaces the file."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class RowBatch:
    """Rows that were read, the offset behind them, and the number of truncations of the file by then."""

    rows: list[MetricRow]
    end_offset: int
    num_truncations: int


class MetricsTail:
    """The undelivered rows of an open metrics.jsonl. It owns the descriptor."""

    def __init__(self, descriptor: int, file: Path) -> None:
        self._descriptor, self._file = descriptor, file
        self._lock = threading.Lock()
        self._offset = 0
        self._truncations: list[int] = []  # bytes that were left by each

    @property
    def is_replaced(self) -> bool:
        """Whether a later attempt has replaced the run's file."""
        return not is_same_file(self._descriptor, self._file)

    def read_batch(self, max_metric_values: int) -> RowBatch:
        """Return the next rows with at most ``max_metric_values`` values together, but at least one row; empty: all are delivered."""
        while True:
            with self._lock:
                offset, num_truncations = self._offset, len(self._truncations)
            lines = self._read_lines(offset)
            rows: list[MetricRow] = []
            values_left = max_metric_values
            for line in lines:
                row = translate_metrics(json.loads(line))
                values_left -= len(row) - 2  # step and time are no values
                if rows and values_left < 0:
                    break
                rows.append(row)
                offset += len(line)
            with self._lock:
                if num_truncations == len(self._truncations):
                    return RowBatch(rows, offset, num_truncations)

    def mark_delivered(self, batch: RowBatch) -> None:
        """Continue behind these rows, or where the file was truncated in the meantime."""
        with self._lock:
            self._offset = min([batch.end_offset, *self._truncations[batch.num_truncations :]])

    def on_truncated(self) -> None:
        """Continue at the new end of the file, if it is now shorter than what was delivered."""
        with self._lock:
            self._truncations.append(os.fstat(self._descriptor).st_size)
            self._offset = min(self._offset, self._truncations[-1])

    def restart(self) -> None:
        """Start from the first row, for a store that has none."""
        with self._lock:
            self._offset = 0

    def count_pending_rows(self) -> int:
        """Count the rows that are not delivered."""
        with self._lock:
            offset = self._offset
        count = 0
        while chunk := os.pread(self._descriptor, _CHUNK_BYTES, offset):
            count, offset = count + chunk.count(b"\n"), offset + len(chunk)
        return count

    def close(self) -> None:
        os.close(self._descriptor)

    def _read_lines(self, offset: int) -> list[bytes]:
        size = _CHUNK_BYTES
        while True:
            chunk = os.pread(self._descriptor, size, offset)
            complete = chunk[: chunk.rfind(b"\n") + 1]
            if complete or len(chunk) < size:
                return complete.splitlines(keepends=True)
            size *= 2  # a single line is longer than the chunk
