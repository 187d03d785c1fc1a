"""Tables of predictions: CSV, JSON lines and Parquet files, and text for a terminal."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from foveal.errors import ConfigError
from foveal.inference.predictions import Columns, Row

IMAGE_COLUMN = "image"
_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_MAX_NAME = 60  # characters of an image's name in text
_TEXT_WIDTHS = {str: 24, int: 8, float: 10}


class PredictionTable(Protocol):
    """A table in the making. ``json_rows`` are the rows as JSON objects, which the formats of columns do not write."""

    def write(self, image: str, rows: Sequence[Row], json_rows: Sequence[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...


def check_table_format(file: Path) -> None:
    """Raise ConfigError unless a file's suffix is that of a table's format."""
    if file.suffix not in _FORMATS:
        raise ConfigError(f"--out {file} says no format: end it in {', '.join(_FORMATS)}")


def open_table(draft: Path, suffix: str, columns: Columns) -> PredictionTable:
    """Return a new table in a file, in the format of a suffix. Raises: OSError."""
    return _FORMATS[suffix](draft, columns)


class CsvTable:
    """RFC 4180 in UTF-8 with a header. All texts are quoted, so that names with commas, quotes and line breaks return."""

    def __init__(self, file: Path, columns: Columns) -> None:
        self._stream = file.open("w", encoding="utf-8", newline="")
        self._columns = tuple(columns)
        self._writer = csv.writer(self._stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        self._writer.writerow((IMAGE_COLUMN, *self._columns))

    def write(self, image: str, rows: Sequence[Row], json_rows: Sequence[Mapping[str, Any]]) -> None:
        self._writer.writerows((image, *(row[name] for name in self._columns)) for row in rows)

    def close(self) -> None:
        self._stream.close()


class JsonLinesTable:
    """One JSON object in a line, in UTF-8."""

    def __init__(self, file: Path, columns: Columns) -> None:
        self._stream = file.open("w", encoding="utf-8", newline="\n")

    def write(self, image: str, rows: Sequence[Row], json_rows: Sequence[Mapping[str, Any]]) -> None:
        for row in json_rows:
            self._stream.write(f"{json.dumps({IMAGE_COLUMN: image} | dict(row), ensure_ascii=False)}\n")

    def close(self) -> None:
        self._stream.close()


class ParquetTable:
    """A Parquet file, a row group for some thousand rows."""

    _GROUP = 1 << 14  # rows that are held in memory

    def __init__(self, file: Path, columns: Columns) -> None:
        fields = [(IMAGE_COLUMN, pa.string()), *((name, _ARROW_TYPES[kind]) for name, kind in columns.items())]
        self._schema = pa.schema(fields)
        self._rows: list[Mapping[str, Any]] = []
        self._stream = file.open("wb")  # of Python, whose errors say what the disk says
        self._writer = pq.ParquetWriter(self._stream, self._schema)

    def write(self, image: str, rows: Sequence[Row], json_rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows += [{IMAGE_COLUMN: image} | dict(row) for row in rows]
        if len(self._rows) >= self._GROUP:
            self._flush()

    def close(self) -> None:
        try:
            if self._rows:
                self._flush()
            self._writer.close()
        finally:
            self._stream.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


class TextTable:
    """Aligned columns for a terminal; the name of an image stands in its first row."""

    def __init__(self, columns: Columns, longest_name: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._columns, self._width = columns, min(_MAX_NAME, max(longest_name, len(IMAGE_COLUMN)))
        self._write_line(IMAGE_COLUMN, [_align(name, kind) for name, kind in columns.items()])

    def write(self, image: str, rows: Sequence[Row], json_rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            cells = [_align(_format(row[name]), kind) for name, kind in self._columns.items()]
            self._write_line(image if number == 0 else "", cells)
        if not rows:
            self._write_line(image, ["nothing"])

    def close(self) -> None:
        self._stream.flush()

    def _write_line(self, image: str, cells: Sequence[str]) -> None:
        name = _printable(image)
        shown = name if len(name) <= self._width else f"…{name[1 - self._width :]}"
        self._stream.write(f"{shown:{self._width}}  {'  '.join(cells)}".rstrip() + "\n")


def _format(value: str | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _printable(str(value))


def _align(text: str, kind: type) -> str:
    width = _TEXT_WIDTHS[kind]
    return f"{text:{width}}" if kind is str else f"{text:>{width}}"


def _printable(text: str) -> str:
    """Return a text without line breaks and control characters, which would break the columns of a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


_FORMATS = {".csv": CsvTable, ".parquet": ParquetTable, ".jsonl": JsonLinesTable}
