"""Packing of images from a CSV or Parquet table of paths, and optionally of labels and splits."""

import csv
import difflib
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.pack.folder import make_file_sample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, build_splits, parse_labels
from foveal.data.pack.writer import map_in_order, write_dataset_if_absent
from foveal.errors import DataError

_CHUNK = 256  # files per job that checks for missing files

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
    """Pack the images that a CSV or Parquet table lists, as shards in hashed order.

    image_column: paths, relative to ``image_root`` (default: the table's folder). label_column: labels or class names;
    an empty cell means no label. split_column: split names; without it ``val_fraction`` of every class is for
    validation. options: fields of PackOptions. Return whether the shards were written now.
    Raises: DataError with the row if the table or an image cannot be read; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")

    def load_dataset() -> PackDataset:
        names = [name for name in (image_column, label_column, split_column) if name is not None]
        columns = _read_columns(table_file, names)
        files = _find_files(
            table_file, image_column, columns[image_column], image_root or table_file.parent, pack_options.workers
        )
        values = columns[label_column] if label_column else [None] * len(files)
        labels, classes = parse_labels(values, f"{table_file}, column '{label_column}'")
        split_names = _read_texts(table_file, split_column, columns[split_column]) if split_column else None
        get_sample = partial(_make_sample, table_file, files, labels)
        pack_splits = build_splits(split_names, labels, pack_options.val_fraction, get_sample)
        return PackDataset(table_file.stem, classes, pack_splits)

    return write_dataset_if_absent(output_folder, load_dataset, pack_options)


def _make_sample(table: Path, files: Sequence[Path], labels: np.ndarray, number: int) -> PackSample:
    return make_file_sample(files, labels, number, f"{files[number]} (row {number + 1} of {table})")


def _read_columns(table: Path, names: Sequence[str]) -> Columns:
    """Return the named columns, one entry per row.

    Raises: DataError if the table cannot be read, is empty, or lacks a column.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if table.suffix.lower() not in readers:
        raise DataError(f"{table}: a table is expected whose name ends in {' or '.join(readers)}")
    try:
        columns = readers[table.suffix.lower()](table, names)
    except FileNotFoundError:
        raise DataError(f"{table}: no such table") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({' '.join(str(error).split())})") from None
    if not next(iter(columns.values())):
        raise DataError(f"{table} has no rows")
    return columns


def _read_csv(table: Path, names: Sequence[str]) -> Columns:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        _require_columns(table, names, rows.fieldnames or ())
        columns: Columns = {name: [] for name in names}
        for row in rows:
            for name in names:
                columns[name].append(row[name])
    return columns


def _read_parquet(table: Path, names: Sequence[str]) -> Columns:
    from pyarrow import parquet  # imported here: a fifth of a second that only Parquet needs

    with parquet.ParquetFile(table) as file:
        _require_columns(table, names, file.schema_arrow.names)
        return file.read(columns=list(names)).to_pydict()


def _require_columns(table: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    for name in names:
        if name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(columns)}"
            raise DataError(f"{table} has no column '{name}'; {hint}")


def _read_texts(table: Path, column: str, values: Sequence[Any]) -> list[str]:
    """Return a column of texts. Raises: DataError for a row without a text."""
    for row, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{table}: row {row} has no text in column '{column}'")
    return [value.strip() for value in values]


def _find_files(table: Path, column: str, values: Sequence[Any], root: Path, workers: int) -> list[Path]:
    """Return the image files. Raises: DataError for a missing file, before hours of packing and not after."""
    files = [root / name for name in _read_texts(table, column, values)]
    chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
    exist = map_in_order(lambda chunk: [file.is_file() for file in chunk], chunks, workers)
    for row, exists in enumerate(itertools.chain.from_iterable(exist), 1):
        if not exists:
            raise DataError(f"{table}: row {row} names {files[row - 1]}, and there is no such file; see --root")
    return files
