"""Packing of images from a CSV or Parquet table of paths or images, and optionally of labels and splits."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from foveal.data.format.class_counts import list_some
from foveal.data.pack.file_parts import describe_other_parts
from foveal.data.pack.folder import make_file_sample
from foveal.data.pack.image_cells import make_cell_sample, require_image_type
from foveal.data.pack.image_paths import find_image_files, find_repeated_files
from foveal.data.pack.label_cells import MISSING_TEXTS, ColumnRules, is_text
from foveal.data.pack.labels import ColumnLabels, parse_labels
from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset, PackSample, build_splits
from foveal.data.pack.split_names import normalize_split_names
from foveal.data.pack.table_file import TableColumns, read_table
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError


def pack_table(
    table_file: Path,
    output_folder: Path,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    split_column: str | None = None,
    image_root: Path | None = None,
    label_separator: str | None = None,
    label_lists: str | None = None,
    **options: Any,
) -> bool:
    """Pack the images that a CSV or Parquet table lists, as shards in hashed order.

    image_column: paths, relative to ``image_root`` (default: the table's folder); in Parquet also bytes of images, or
    structs of bytes and path. label_column: class numbers, class names, or lists of them; an empty cell means no label.
    label_separator, label_lists: ``separator`` and ``lists`` of ``ColumnRules``. split_column: split names; without it
    ``val_fraction`` of every class is for validation. options: fields of PackOptions. Return whether the shards were
    written now.
    Raises: DataError with the row if the table or an image cannot be read, or a label's meaning is not certain;
    ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    root = image_root or table_file.parent

    def load_dataset() -> PackDataset:
        names = [name for name in (image_column, label_column, split_column) if name is not None]
        table = read_table(table_file, names, output_folder.resolve().parent)
        images = table.columns[image_column]
        image_kind = require_image_type(images.type, f"{table_file}, column '{image_column}'")
        labels = _read_labels(
            table_file, table, label_column, ColumnRules(None, table.is_csv, label_separator, label_lists)
        )
        split_names = _read_split_names(table_file, split_column, table) if split_column else None
        notes = [*describe_other_parts(table_file), *table.notes]
        if image_kind == "paths":
            texts = _read_texts(table_file, image_column, table)
            files, path_notes = find_image_files(table_file, texts, root, pack_options.workers)
            notes += path_notes + find_repeated_files(table_file, files, labels, split_names)
            get_sample = partial(_make_file_sample, table_file, files, labels)
        else:
            get_sample = partial(_make_cell_sample, table_file, images, labels, root)
        if label_column is None and (others := sorted(set(table.all_names) - set(names))):
            notes.append(f"packed without labels: --label-column names their column ({list_some(others)})")
        pack_splits = build_splits(split_names, labels.labels, pack_options.val_fraction, get_sample)
        return labels.make_dataset(table_file.stem, pack_splits, notes)

    settings = {"image_column": image_column, "label_column": label_column, "split_column": split_column}
    settings |= {"label_separator": label_separator, "label_lists": label_lists}
    return write_dataset_if_absent(output_folder, PackSource("table", table_file, settings), load_dataset, pack_options)


def _make_file_sample(table: Path, files: Sequence[Path], labels: ColumnLabels, number: int) -> PackSample:
    location = f"{files[number]} (row {number + 1} of {table})"
    return replace(make_file_sample(files, labels.labels, number, location), label=labels[number])


def _make_cell_sample(
    table: Path, images: pa.ChunkedArray, labels: ColumnLabels, root: Path, number: int
) -> PackSample:
    return make_cell_sample(images[number].as_py(), number, labels[number], root, f"{table}: row {number + 1}")


def _read_labels(table: Path, columns: TableColumns, name: str | None, rules: ColumnRules) -> ColumnLabels:
    if name is None:
        return ColumnLabels(np.full(len(next(iter(columns.columns.values()))), -1, dtype=np.int64))
    labels = parse_labels(columns.columns[name], f"{table}, column '{name}'", rules)
    return replace(labels, notes=tuple(f"column '{name}': {note}" for note in labels.notes))


def _read_split_names(table: Path, name: str, columns: TableColumns) -> list[str]:
    """Return a column of splits: texts, flags or whole numbers; 1.0, as a float or as a text in CSV, is 1.

    Raises: DataError for a row without a split, and for a name that no split can have.
    """
    values = columns.columns[name].to_pylist()
    texts = [None if value is None or value != value else str(value).strip() for value in values]  # noqa: PLR0124 - NaN
    if columns.is_csv or not is_text(columns.columns[name].type):
        texts = [text and re.sub(r"^(\d+)\.0+$", r"\1", text) for text in texts]
    as_texts = replace(columns, columns=columns.columns | {name: pa.array(texts, pa.large_string())})
    names = _read_texts(table, name, as_texts)
    try:
        normalize_split_names(names)
    except DataError as error:
        raise DataError(f"{table}, column '{name}': {error}") from None
    return names


def _read_texts(table: Path, name: str, columns: TableColumns) -> list[str]:
    """Return a column of texts. Raises: DataError for a row without a text."""
    values = columns.columns[name].to_pylist()
    missing = MISSING_TEXTS if columns.is_csv else ()
    for row, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip() or value.strip() in missing:
            raise DataError(f"{table}: row {row} has no text in column '{name}'")
    return [value.strip() for value in values]
