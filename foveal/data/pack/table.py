"""A table of image paths, and of labels and splits if it has them: CSV or Parquet."""

import csv
import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.pack.folder import make_file_sample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, build_splits, parse_labels
from foveal.data.pack.writer import map_in_order, write_dataset
from foveal.errors import DataError

_CHUNK = 256  # files that one thread looks for at a time

Columns = dict[str, list[Any]]


def pack_table(
    table_file: Path,
    output_folder: Path,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    split_column: str | None = None,
    image_root: Path | None = None,
    **options: Any,
) -> bool:
    """The images that a CSV or Parquet table names, as shards in hashed order.

    image_column: paths, relative to ``root`` (default: the folder of the table). label_column: labels or names of
    classes, empty for images without. split_column: names of splits; else ``val_fraction`` of every class is for
    validation. options: of ``Recipe``. Returns whether the shards were written now.
    Raises: DataError for a table or image that cannot be read, in one sentence with the row; ConfigError for options
    that cannot be.
    """
    recipe = PackOptions.from_dict(options, "pack")

    def contents() -> PackDataset:
        wanted = [name for name in (image_column, label_column, split_column) if name is not None]
        columns = _read_columns(table_file, wanted)
        files = _find_files(
            table_file, image_column, columns[image_column], image_root or table_file.parent, recipe.workers
        )
        values = columns[label_column] if label_column else [None] * len(files)
        labels, classes = parse_labels(values, f"{table_file}, column '{label_column}'")
        splits = _read_texts(table_file, split_column, columns[split_column]) if split_column else None
        parts = build_splits(splits, labels, recipe.val_fraction, partial(_sample, table_file, files, labels))
        return PackDataset(table_file.stem, classes, parts)

    return write_dataset(output_folder, contents, recipe)


def _sample(table: Path, files: Sequence[Path], labels: np.ndarray, number: int) -> PackSample:
    return make_file_sample(files, labels, number, f"{files[number]} (row {number + 1} of {table})")


def _read_columns(table: Path, wanted: Sequence[str]) -> Columns:
    """The wanted columns, one entry for each row.

    Raises: DataError for a table that cannot be read, is empty, or lacks a column.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if table.suffix.lower() not in readers:
        raise DataError(f"{table}: a table is expected whose name ends in {' or '.join(readers)}")
    try:
        columns = readers[table.suffix.lower()](table, wanted)
    except FileNotFoundError:
        raise DataError(f"{table}: no such table") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({' '.join(str(error).split())})") from None
    if not next(iter(columns.values())):
        raise DataError(f"{table} has no rows")
    return columns


def _read_csv(table: Path, wanted: Sequence[str]) -> Columns:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        _require_columns(table, wanted, rows.fieldnames or ())
        columns: Columns = {name: [] for name in wanted}
        for row in rows:
            for name in wanted:
                columns[name].append(row[name])
    return columns


def _read_parquet(table: Path, wanted: Sequence[str]) -> Columns:
    from pyarrow import parquet  # a fifth of a second of import that only this needs

    with parquet.ParquetFile(table) as file:
        _require_columns(table, wanted, file.schema_arrow.names)
        return file.read(columns=list(wanted)).to_pydict()


def _require_columns(table: Path, wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names)}"
            raise DataError(f"{table} has no column '{name}'; {hint}")


def _read_texts(table: Path, column: str, values: Sequence[Any]) -> list[str]:
    """A column in which every row has a text."""
    for row, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{table}: row {row} has no text in column '{column}'")
    return [value.strip() for value in values]


def _find_files(table: Path, column: str, values: Sequence[Any], root: Path, workers: int) -> list[Path]:
    """The image files; that one is missing is found before the hours of packing, not after."""
    files = [root / name for name in _read_texts(table, column, values)]
    chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
    found = map_in_order(lambda chunk: [file.is_file() for file in chunk], chunks, workers)
    for row, there in enumerate((each for chunk in found for each in chunk), 1):
        if not there:
            raise DataError(f"{table}: row {row} names {files[row - 1]}, and there is no such file; see --root")
    return files
