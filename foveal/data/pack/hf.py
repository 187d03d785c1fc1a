"""Packing of Hugging Face `datasets` folders."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from foveal.data.indexing.labels import normalize_name
from foveal.data.pack.file_parts import describe_missing_parts
from foveal.data.pack.image_cells import holds_image_bytes, make_cell_sample, require_image_type
from foveal.data.pack.label_cells import ColumnRules
from foveal.data.pack.labels import ColumnLabels, parse_labels
from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset, PackSample, build_splits
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError

_SAVED_FILES = ("dataset_dict.json", "state.json")  # written by save_to_disk


def pack_hf(
    dataset_folder: Path,
    output_folder: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    label_lists: str | None = None,
    **options: Any,
) -> bool:
    """Pack a `datasets` folder, written by save_to_disk or readable by load_dataset, as shards in hashed order.

    image_column: default, the only column of type Image, or else of bytes. label_column: default, the only column of type
    ClassLabel. label_separator, label_lists: ``separator`` and ``lists`` of ``ColumnRules``. The stored bytes are kept
    unless ``options`` (of PackOptions) change them. If 'train' is the only split, it is divided as in ``pack_folder``;
    'validation' becomes 'val'. Return whether the shards were written now.
    Raises: DataError if `datasets` is not installed or cannot read the folder, a column is missing or of another type, or
    a label's meaning is not certain; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")

    def load_dataset() -> PackDataset:
        library = _import_datasets(dataset_folder)
        splits, files = _open_splits(library, dataset_folder)
        part_notes = describe_missing_parts(dataset_folder.resolve(), files)
        images = _find_image_column(dataset_folder, library, splits, image_column)
        labels = _read_labels(
            dataset_folder, library, splits, label_column, ColumnRules(None, False, label_separator, label_lists)
        )
        dataset = _make_dataset(dataset_folder, library, splits, images, labels, pack_options)
        return replace(dataset, notes=(*part_notes, *dataset.notes))

    settings = {"image_column": image_column, "label_column": label_column}
    settings |= {"label_separator": label_separator, "label_lists": label_lists}
    return write_dataset_if_absent(
        output_folder, PackSource("hf", dataset_folder, settings), load_dataset, pack_options
    )


def _make_dataset(
    source: Path,
    library: ModuleType,
    splits: dict[str, Any],
    image_column: str,
    labels: ColumnLabels,
    options: PackOptions,
) -> PackDataset:
    names = list(splits)
    image_tables = [split.with_format(None).select_columns([image_column]) for split in splits.values()]
    image_tables = [
        table.cast_column(image_column, library.Image(decode=False))
        if isinstance(table.features[image_column], library.Image)
        else table
        for table in image_tables
    ]
    ends = list(itertools.accumulate(len(table) for table in image_tables))

    def get_sample(number: int) -> PackSample:
        split = int(np.searchsorted(ends, number, side="right"))
        row = number - (ends[split - 1] if split else 0)
        location = f"{source}: row {row} of split '{names[split]}'"
        return make_cell_sample(image_tables[split][row][image_column], row, labels[number], source, location)

    split_names = None if names == ["train"] else [name for name, split in splits.items() for _ in range(len(split))]
    pack_splits = build_splits(split_names, labels.labels, options.val_fraction, get_sample)
    return labels.make_dataset(source.resolve().name, pack_splits)


def _import_datasets(source: Path) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: folders of `datasets` are read with that library, which is not installed: "
            f"pip install 'foveal[hf]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _open_splits(library: ModuleType, source: Path) -> tuple[dict[str, Any], list[Path]]:
    """Open the splits of a folder; return them and the files that they were read from, if names chose these.

    Raises: DataError.
    """
    if not source.is_dir():  # the library would search the Hub for it
        raise DataError(f"{source}: no such folder")
    files: list[Path] = []
    try:
        if any((source / name).is_file() for name in _SAVED_FILES):
            loaded = library.load_from_disk(str(source))
        else:
            builder = library.load_dataset_builder(str(source.resolve()))
            files = [Path(file) for names in (builder.config.data_files or {}).values() for file in names]
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    except Exception as error:  # noqa: BLE001 - the library raises errors of its own and of other libraries
        cause = error.__cause__ or error  # the reason is in the cause
        raise DataError(f"{source} cannot be read by `datasets` ({' '.join(str(cause).split())})") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    if not any(len(split) for split in splits.values()):
        raise DataError(f"{source} has no rows")
    return splits, files


def _find_image_column(source: Path, library: ModuleType, splits: dict[str, Any], name: str | None) -> str:
    """Return the column of images: the named one, the only one of type Image, or the only one of bytes."""
    features = next(iter(splits.values())).features
    kinds: dict[str, pa.DataType] = {field.name: field.type for field in features.arrow_schema}
    name = name or _find_column(source, features, library.Image, "--image-column")
    if not name:
        stored = [column for column, kind in kinds.items() if holds_image_bytes(kind)]
        if len(stored) != 1:
            choice = f", and several hold bytes, {', '.join(stored)}: choose with --image-column" if stored else ""
            raise DataError(
                f"{source}: no column is of type Image{choice}; the columns are {_format_columns(features)}"
            )
        name = stored[0]
    for split, table in splits.items():
        if name not in table.features:
            raise DataError(
                f"{source}: split '{split}' has no column '{name}'; the columns are {_format_columns(table.features)}"
            )
        location = f"{source}: column '{name}' of split '{split}'"
        if require_image_type(table.features.arrow_schema.field(name).type, location) == "paths":
            raise DataError(
                f"{location} holds texts and is no column of type Image; the columns are "
                f"{_format_columns(features)}; tables of paths are packed by `foveal data pack table`"
            )
    return name


def _find_column(source: Path, features: dict[str, Any], kind: type, option: str) -> str | None:
    """Return the only column of a type, or None. Raises: DataError if there are several."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) > 1:
        raise DataError(
            f"{source} has several columns of type {kind.__name__}, {', '.join(names)}: choose with {option}"
        )
    return names[0] if names else None


def _format_columns(features: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _read_labels(
    source: Path, library: ModuleType, splits: dict[str, Any], column: str | None, rules: ColumnRules
) -> ColumnLabels:
    """Return the labels of all rows, split after split."""
    num_rows = sum(len(split) for split in splits.values())
    first = next(iter(splits.values())).features
    column = column or _find_column(source, first, library.ClassLabel, "--label-column")
    if column is None:
        sentence = f"no column is of type ClassLabel, and --label-column names another ({_format_columns(first)})"
        return ColumnLabels(np.full(num_rows, -1), notes=(f"packed without labels: {sentence}",))
    chunks, features, notes = [], [], []
    for name, split in splits.items():
        if column in split.features:
            features.append(getattr(split.features[column], "feature", split.features[column]))
            chunks += _read_chunks(split, column)
        elif column in first:
            chunks.append(pa.nulls(len(split), chunks[0].type))
            notes.append(f"split '{name}' has no column '{column}' and is packed without labels")
        else:
            raise DataError(f"{source} has no column '{column}'; the columns are {_format_columns(first)}")
    if any(chunk.type != chunks[0].type for chunk in chunks):
        raise DataError(f"{source}: the splits store column '{column}' in different types: save them in one")
    class_labels = [feature for feature in features if isinstance(feature, library.ClassLabel)]
    if class_labels:
        if len(class_labels) < len(features):
            raise DataError(
                f"{source}: column '{column}' is of type ClassLabel in some splits and holds plain numbers in others: cast "
                f"it to one type, with one order of names"
            )
        if len({tuple(map(normalize_name, feature.names)) for feature in class_labels}) > 1:
            raise DataError(f"{source}: the splits name the classes of column '{column}' differently")
        rules = replace(rules, names=tuple(class_labels[0].names))
    labels = parse_labels(pa.chunked_array(chunks), f"{source}, column '{column}'", rules)
    return replace(labels, notes=(*notes, *(f"column '{column}': {note}" for note in labels.notes)))


def _read_chunks(split: Any, column: str) -> Sequence[pa.Array]:
    """Return a column in the order of the split's rows."""
    data = split.select_columns([column]).with_format("arrow")[:][column]
    return data.chunks if data.num_chunks else [pa.array([], data.type)]
