"""Reading of tables: CSV with any usual separator, and Parquet."""

import codecs
import csv
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import parquet

from foveal.data.format.class_counts import list_some
from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.image_cells import holds_image_bytes, unpack_parquet_images
from foveal.errors import DataError

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_NUM_EXAMINED = 4096  # bytes of a CSV that tell its encoding


@dataclass(frozen=True)
class TableColumns:
    """Columns that were asked for, the names of all, and what is to be said of the file."""

    columns: dict[str, pa.Array | pa.ChunkedArray]
    all_names: tuple[str, ...]
    is_csv: bool
    notes: tuple[str, ...] = ()


def read_table(table: Path, names: Sequence[str], temporary_folder: Path) -> TableColumns:
    """Return the named columns, one entry per row; columns with images inside are unpacked to ``temporary_folder``.

    Raises: DataError if the table cannot be read, is empty, or does not have each column once.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    if table.is_dir():
        raise DataError(f"{table} is a folder: name a table in it, or pack a folder of tables by `foveal data pack hf`")
    if table.suffix.lower() not in readers:
        raise DataError(f"{table}: a table is expected whose name ends in .csv, .tsv or .parquet")
    try:
        found = readers[table.suffix.lower()](table, names, temporary_folder)
    except FileNotFoundError:
        raise DataError(f"{table}: no such table") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{table} cannot be read ({error}): save it as UTF-8") from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{table} cannot be read ({' '.join(str(error).split())})") from None
    if not len(next(iter(found.columns.values()))):
        raise DataError(f"{table} has no rows")
    return found


def _read_csv(table: Path, names: Sequence[str], _temporary_folder: Path) -> TableColumns:
    with table.open(newline="", encoding=_find_encoding(table)) as stream:
        separator = _find_separator(stream, names)
        rows = csv.reader(stream, delimiter=separator, skipinitialspace=True)
        header = tuple(name.strip() for name in next(filter(None, rows), []))
        _require_columns(table, names, header)
        places = {name: header.index(name) for name in names}
        columns: dict[str, list[str]] = {name: [] for name in names}
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) > len(header) and any(cell.strip() for cell in row[len(header) :]):
                raise DataError(
                    f"{table}: row {number} has {len(row)} cells, and the first row names {len(header)} columns: put cells "
                    f"that contain {_SEPARATORS[separator]} in quotes"
                )
            if len(row) <= max(places.values()):
                raise DataError(
                    f"{table}: row {number} has {len(row)} {'cell' if len(row) == 1 else 'cells'}, and the first row names "
                    f"{len(header)} columns: complete the row, with empty cells where there is no value"
                )
            for name, place in places.items():
                columns[name].append(row[place])
    notes = () if separator == "," else (f"{_SEPARATORS[separator]} separates the columns",)
    return TableColumns(
        {name: pa.array(cells, pa.large_string()) for name, cells in columns.items()}, header, is_csv=True, notes=notes
    )


def _find_encoding(table: Path) -> str:
    """Return the encoding of a CSV: UTF-8, or UTF-16 if it begins with that mark, as Excel writes Unicode text.

    Raises: DataError for UTF-16 without mark.
    """
    with table.open("rb") as stream:
        start = stream.read(_NUM_EXAMINED)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not start.startswith(codecs.BOM_UTF32_LE):
        return "utf-16"
    if b"\0" in start:
        raise DataError(f"{table} holds zero bytes, as UTF-16 and binary files do: save it as UTF-8")
    return "utf-8-sig"


def _find_separator(stream: IO[str], names: Sequence[str]) -> str:
    """Return the separator under which the first row has all names; the comma if none has. Leave the stream at 0."""
    first = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    for separator in _SEPARATORS:
        header = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        if {name.strip() for name in header} >= set(names):
            return separator
    return ","


def _read_parquet(table: Path, names: Sequence[str], temporary_folder: Path) -> TableColumns:
    with parquet.ParquetFile(table) as file:
        schema = file.schema_arrow
        _require_columns(table, names, schema.names)
        for name in names:
            extension = (schema.field(name).metadata or {}).get(b"ARROW:extension:name")
            if extension:  # a period of time, for example, is stored as a number
                raise DataError(
                    f"{table}: column '{name}' is of the extension type {extension.decode()}, and is to hold plain numbers, "
                    f"texts, lists or bytes: convert it"
                )
        unpacked = {name for name in names if holds_image_bytes(schema.field(name).type)}
        columns = file.read(columns=[name for name in names if name not in unpacked])
    return TableColumns(
        {
            name: unpack_parquet_images(table, name, temporary_folder) if name in unpacked else columns.column(name)
            for name in names
        },
        tuple(schema.names),
        is_csv=False,
    )


def _require_columns(table: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    files = [name for name in columns if Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    counts = Counter(columns)
    for name in names:
        if name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(columns)}"
            hint = f"its first row names {list_some(files[:1])}: the first row must name the columns" if files else hint
            raise DataError(f"{table} has no column '{name}'; {hint}")
        if counts[name] > 1:
            raise DataError(f"{table} has {counts[name]} columns '{name}': rename all but one")
