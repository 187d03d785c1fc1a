"""Packing of Hugging Face `datasets` folders."""

import itertools
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, build_splits, make_webdataset_key, parse_labels
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError

_SAVED_FILES = ("dataset_dict.json", "state.json")  # written by save_to_disk


def pack_hf(
    dataset_folder: Path,
    output_folder: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> bool:
    """Pack a `datasets` folder, written by save_to_disk or readable by load_dataset, as shards in hashed order.

    image_column, label_column: default, the only column of type Image, and of type ClassLabel if there is one. The
    stored bytes are kept unless ``options`` (of PackOptions) change them. If 'train' is the only split, it is divided
    as in ``pack_folder``; 'validation' becomes 'val'. Return whether the shards were written now.
    Raises: DataError if `datasets` is not installed or cannot read the folder, or a column is missing or of another
    type; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    return write_dataset_if_absent(
        output_folder, partial(_load_dataset, dataset_folder, image_column, label_column, pack_options), pack_options
    )


def _load_dataset(
    source: Path, image_column: str | None, label_column: str | None, options: PackOptions
) -> PackDataset:
    library = _import_datasets(source)
    splits = _open_splits(library, source)
    first = next(iter(splits.values()))
    image_column = image_column or _find_column(source, first.features, library.Image, "--image-column")
    if image_column is None or not isinstance(first.features.get(image_column), library.Image):
        problem = "no column is" if image_column is None else f"'{image_column}' is no column"
        raise DataError(f"{source}: {problem} of type Image; the columns are {_format_columns(first)}")
    label_column = label_column or _find_column(source, first.features, library.ClassLabel, "--label-column")
    if label_column is not None and label_column not in first.features:
        raise DataError(f"{source} has no column '{label_column}'; the columns are {_format_columns(first)}")
    labels, classes = _read_labels(source, library, splits, label_column)
    names = list(splits)
    image_tables = [
        split.select_columns([image_column]).cast_column(image_column, library.Image(decode=False))
        for split in splits.values()
    ]
    ends = list(itertools.accumulate(len(table) for table in image_tables))

    def get_sample(number: int) -> PackSample:
        split = int(np.searchsorted(ends, number, side="right"))
        row = number - (ends[split - 1] if split else 0)
        location = f"{source}: row {row} of split '{names[split]}'"
        cell = image_tables[split][row][image_column] or {}
        stem = Path(cell.get("path") or "image").stem
        return PackSample(
            make_webdataset_key(row, stem), None, int(labels[number]), partial(_read_image, cell, location), location
        )

    split_names = None if names == ["train"] else [name for name, split in splits.items() for _ in range(len(split))]
    pack_splits = build_splits(split_names, labels, options.val_fraction, get_sample)
    return PackDataset(source.resolve().name, classes, pack_splits)


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


def _open_splits(library: ModuleType, source: Path) -> dict[str, Any]:
    """Open the splits of a folder. Raises: DataError."""
    if not source.is_dir():  # the library would search the Hub for it
        raise DataError(f"{source}: no such folder")
    try:
        if any((source / name).is_file() for name in _SAVED_FILES):
            loaded = library.load_from_disk(str(source))
        else:
            loaded = library.load_dataset(str(source.resolve()))
    except Exception as error:  # noqa: BLE001 - the library raises errors of its own and of other libraries
        cause = error.__cause__ or error  # the reason is in the cause
        raise DataError(f"{source} cannot be read by `datasets` ({' '.join(str(cause).split())})") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    if not any(len(split) for split in splits.values()):
        raise DataError(f"{source} has no rows")
    return splits


def _find_column(source: Path, features: dict[str, Any], kind: type, option: str) -> str | None:
    """Return the only column of a type, or None. Raises: DataError if there are several."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) > 1:
        raise DataError(
            f"{source} has several columns of type {kind.__name__}, {', '.join(names)}: choose with {option}"
        )
    return names[0] if names else None


def _format_columns(split: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in split.features.items())


def _read_labels(
    source: Path, library: ModuleType, splits: dict[str, Any], column: str | None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return the labels of all rows, split after split, and the class names."""
    if column is None:
        num_rows = sum(len(split) for split in splits.values())
        return np.full(num_rows, -1, dtype=np.int64), None
    values: list[Any] = []
    for split in splits.values():
        values += split.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    features = [split.features.get(column) for split in splits.values()]
    if not isinstance(features[0], library.ClassLabel):
        return parse_labels(values, f"{source}, column '{column}'")
    if any(getattr(feature, "names", None) != features[0].names for feature in features):
        raise DataError(f"{source}: the splits name the classes of column '{column}' differently")
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), tuple(features[0].names)


def _read_image(cell: dict[str, Any], location: str) -> bytes:
    """Return the stored bytes of an image, or the bytes of the file at its path."""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise DataError(f"{location} has no image")
    return Path(cell["path"]).read_bytes()
