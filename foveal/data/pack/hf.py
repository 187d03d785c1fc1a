"""Data sets of the Hugging Face `datasets` library that lie in a folder."""

import itertools
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, build_splits, make_webdataset_key, parse_labels
from foveal.data.pack.writer import write_dataset
from foveal.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


def pack_hf(
    dataset_folder: Path,
    output_folder: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> bool:
    """A folder of `datasets`, written by save_to_disk or read by load_dataset, as shards in hashed order.

    image_column, label_column: default, the only column of type Image, and of type ClassLabel if there is one. Images
    go in as the bytes that are stored unless an option of ``Recipe`` says otherwise. A set with the one
    split 'train' is divided as ``pack_folder`` does, 'validation' is called 'val'. Returns whether the shards were written now.
    Raises: DataError if `datasets` is not installed or cannot read the folder, or for a column that is not there or of
    another type; ConfigError for options that cannot be.
    """
    recipe = PackOptions.from_dict(options, "pack")
    return write_dataset(
        output_folder, partial(_load_dataset, dataset_folder, image_column, label_column, recipe), recipe
    )


def _load_dataset(source: Path, image_column: str | None, label_column: str | None, recipe: PackOptions) -> PackDataset:
    library = _import_datasets(source)
    splits = _open_splits(library, source)
    first = next(iter(splits.values()))
    image = image_column or _find_column(source, first.features, library.Image, "--image-column")
    if image is None or not isinstance(first.features.get(image), library.Image):
        wrong = "no column is" if image is None else f"'{image}' is no column"
        raise DataError(f"{source}: {wrong} of type Image; the columns are {_format_columns(first)}")
    label = label_column or _find_column(source, first.features, library.ClassLabel, "--label-column")
    if label is not None and label not in first.features:
        raise DataError(f"{source} has no column '{label}'; the columns are {_format_columns(first)}")
    labels, classes = _read_labels(source, library, splits, label)
    rows = [split.select_columns([image]).cast_column(image, library.Image(decode=False)) for split in splits.values()]
    ends = list(itertools.accumulate(len(split) for split in rows))
    names = list(splits)

    def sample(number: int) -> PackSample:
        at = int(np.searchsorted(ends, number, side="right"))
        row = number - (ends[at - 1] if at else 0)
        where = f"{source}: row {row} of split '{names[at]}'"
        cell = rows[at][row][image] or {}
        name = Path(cell.get("path") or "image")
        return PackSample(
            make_webdataset_key(row, name.stem), None, int(labels[number]), partial(_read_image, cell, where), where
        )

    of_split = None if names == ["train"] else [name for name, split in splits.items() for _ in range(len(split))]
    return PackDataset(source.resolve().name, classes, build_splits(of_split, labels, recipe.val_fraction, sample))


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
    """The splits of a folder."""
    if not source.is_dir():  # asked here: the library would look for it on a hub
        raise DataError(f"{source}: no such folder")
    try:
        if any((source / name).is_file() for name in _SAVED):
            found = library.load_from_disk(str(source))
        else:
            found = library.load_dataset(str(source.resolve()))
    except Exception as error:  # noqa: BLE001 - a library with errors of its own and of many others
        cause = error.__cause__ or error  # what went wrong, not that something did
        raise DataError(f"{source} cannot be read by `datasets` ({' '.join(str(cause).split())})") from None
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
    if not any(len(split) for split in splits.values()):
        raise DataError(f"{source} has no rows")
    return splits


def _find_column(source: Path, features: dict[str, Any], kind: type, option: str) -> str | None:
    """The one column of a type, or none."""
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
    """Labels of all rows, split after split, and the names of the classes."""
    rows = sum(len(split) for split in splits.values())
    if column is None:
        return np.full(rows, -1, dtype=np.int64), None
    values: list[Any] = []
    for split in splits.values():
        values += split.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    kinds = [split.features.get(column) for split in splits.values()]
    if not isinstance(kinds[0], library.ClassLabel):
        return parse_labels(values, f"{source}, column '{column}'")
    if any(getattr(kind, "names", None) != kinds[0].names for kind in kinds):
        raise DataError(f"{source}: the splits name the classes of column '{column}' differently")
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), tuple(kinds[0].names)


def _read_image(cell: dict[str, Any], where: str) -> bytes:
    """The stored bytes of an image, or those of the file that it names."""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise DataError(f"{where} has no image")
    return Path(cell["path"]).read_bytes()
