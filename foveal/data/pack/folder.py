"""Packing of folders of images, one folder per class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, build_splits, hashed_order, make_webdataset_key
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError

_SPLITS = ("train", "val", "test")


def pack_folder(image_folder: Path, output_folder: Path, **options: Any) -> bool:
    """Pack a folder of images, with one sub-folder per class, as shards in hashed order.

    Sub-folders `train` and `val` or `test` are splits; without them ``val_fraction`` of every class is for validation.
    Files are stored unchanged unless ``options`` (of PackOptions) change them. mean and std are estimated from at most
    4,096 training images. Return whether the shards were written now.
    Raises: DataError if the source is missing or empty, a split has classes that train lacks, an image that must be
    decoded does not decode, or the target holds other files; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    return write_dataset_if_absent(output_folder, partial(_list_dataset, image_folder, pack_options), pack_options)


def make_file_sample(files: Sequence[Path], labels: np.ndarray, number: int, location: str = "") -> PackSample:
    """Return the sample of a file; its suffix gives the field."""
    file = files[number]
    suffix = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    field = suffix if suffix in IMAGE_EXTENSIONS else None
    return PackSample(
        make_webdataset_key(number, file.stem), field, int(labels[number]), file.read_bytes, location or str(file)
    )


def _list_dataset(source: Path, options: PackOptions) -> PackDataset:
    if not source.is_dir():
        raise DataError(f"{source}: no such folder of images")
    splits = [name for name in _SPLITS if (source / name).is_dir()]
    if splits[:1] != ["train"] or len(splits) == 1:
        classes, files, labels = _list_images(source)
        pack_splits = build_splits(None, labels, options.val_fraction, partial(make_file_sample, files, labels))
        return PackDataset(source.resolve().name, tuple(classes), pack_splits)
    train_images = _list_images(source / "train")
    classes = train_images[0]
    pack_splits = {}
    for split in splits:
        split_classes, files, labels = train_images if split == "train" else _list_images(source / split)
        if not set(split_classes) <= set(classes):
            extra = ", ".join(sorted(set(split_classes) - set(classes)))
            raise DataError(f"{source / split} has classes that {source}/train lacks: {extra}")
        labels = np.array([classes.index(name) for name in split_classes])[labels]
        pack_splits[split] = PackSplit(hashed_order(len(files)), partial(make_file_sample, files, labels))
    return PackDataset(source.resolve().name, tuple(classes), pack_splits)


def _list_images(source: Path) -> tuple[list[str], list[Path], np.ndarray]:
    """Return class names, image files and their labels, by name. Raises: DataError for a class without images."""
    names = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    labelled_files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((source / name).rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and not file.name.startswith(".")
    ]
    empty = set(range(len(names))) - {label for _, label in labelled_files}
    if not labelled_files or empty:
        empty_folder = f"{source / names[min(empty)]}" if empty else f"{source}"
        raise DataError(
            f"{empty_folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}): "
            f"one folder per class is expected in {source}"
        )
    return names, [file for file, _ in labelled_files], np.array([label for _, label in labelled_files])
