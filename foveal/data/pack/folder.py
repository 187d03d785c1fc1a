"""Folders of images sorted into one folder per class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, build_splits, hashed_order, make_webdataset_key
from foveal.data.pack.writer import write_dataset
from foveal.errors import DataError

_SPLITS = ("train", "val", "test")


def pack_folder(image_folder: Path, output_folder: Path, **options: Any) -> bool:
    """A folder of images sorted into one folder per class, as shards in hashed order.

    With sub-folders `train` and `val` or `test` these are the splits, else ``val_fraction`` of every class is for
    validation. Files go in as they are unless an option of ``Recipe`` says otherwise. mean and std are estimated from
    at most 4,096 training images. Returns whether the shards were written now.
    Raises: DataError for a missing or empty source, classes that differ between the splits, an image that must be
    decoded and cannot be, or a target that holds something else; ConfigError for options that cannot be.
    """
    recipe = PackOptions.from_dict(options, "pack")
    return write_dataset(output_folder, partial(_list_dataset, image_folder, recipe), recipe)


def make_file_sample(files: Sequence[Path], labels: np.ndarray, number: int, location: str = "") -> PackSample:
    """The sample of a file, of the kind that its suffix says."""
    file = files[number]
    suffix = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    kind = suffix if suffix in IMAGE_EXTENSIONS else None
    return PackSample(
        make_webdataset_key(number, file.stem), kind, int(labels[number]), file.read_bytes, location or str(file)
    )


def _list_dataset(source: Path, recipe: PackOptions) -> PackDataset:
    if not source.is_dir():
        raise DataError(f"{source}: no such folder of images")
    splits = [name for name in _SPLITS if (source / name).is_dir()]
    if splits[:1] != ["train"] or len(splits) == 1:
        classes, files, labels = _list_images(source)
        parts = build_splits(None, labels, recipe.val_fraction, partial(make_file_sample, files, labels))
        return PackDataset(source.resolve().name, tuple(classes), parts)
    classes, _, _ = found = _list_images(source / "train")
    parts = {}
    for split in splits:
        others, files, labels = found if split == "train" else _list_images(source / split)
        if not set(others) <= set(classes):
            extra = ", ".join(sorted(set(others) - set(classes)))
            raise DataError(f"{source / split} has classes that {source}/train lacks: {extra}")
        labels = np.array([classes.index(name) for name in others])[labels]
        parts[split] = PackSplit(hashed_order(len(files)), partial(make_file_sample, files, labels))
    return PackDataset(source.resolve().name, tuple(classes), parts)


def _list_images(source: Path) -> tuple[list[str], list[Path], np.ndarray]:
    """Class names, image files and their labels, sorted by name."""
    names = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((source / name).rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and not file.name.startswith(".")
    ]
    empty = set(range(len(names))) - {label for _, label in found}
    if not found or empty:
        which = f"{source / names[min(empty)]}" if empty else f"{source}"
        raise DataError(
            f"{which} holds no images ({', '.join(IMAGE_EXTENSIONS)}): one folder per class is expected in {source}"
        )
    return names, [file for file, _ in found], np.array([label for _, label in found])
