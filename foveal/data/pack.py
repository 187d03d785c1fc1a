"""From images to shards with manifest and index. A folder appears whole or not at all, with the same bytes each time."""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.data.index import describe, fields_of, index_shard
from foveal.data.manifest import NAME, Manifest, read_manifest, write_manifest
from foveal.data.shardindex import IMAGES, write_index
from foveal.data.transforms import decode
from foveal.errors import DataError
from foveal.seeding import key, ranks_of

_PLACE = key(0, "split")  # one division into training and validation for everybody, whatever the run's seed
_DIGITS_VAL = 360
_DIGITS_SHARD = 256
_STATISTICS = 4096  # training images that mean and std of a folder are estimated from


@dataclass(frozen=True)
class _Source:
    """A sample still to be written."""

    key: str
    field: str
    label: int
    read: Callable[[], bytes]


def pack_digits(folder: Path) -> bool:
    """scikit-learn's handwritten digits as PNG shards: 1,437 for training, 360 for validation, 36 of each class.

    Returns whether they were written now; a folder that holds them already is left alone.
    Errors: DataError if the folder holds something else.
    """
    if _is_packed(folder):
        return False
    from sklearn.datasets import load_digits  # half a second of import that only packing needs

    digits: Any = load_digits()
    labels = digits.target.astype(np.int64)
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0..16
    train, val = _stratified(labels, dict.fromkeys(range(10), _DIGITS_VAL // 10))

    def source(number: int) -> _Source:
        return _Source(f"digit_{number:04d}", "png", int(labels[number]), lambda: _png(grey[number]))

    scaled = grey[train] / 255.0
    with_names = {"train": [source(number) for number in train], "val": [source(number) for number in val]}
    classes = tuple(str(digit) for digit in range(10))
    _write(folder, "digits", with_names, _DIGITS_SHARD, classes, ((float(scaled.mean()),), (float(scaled.std()),)))
    return True


def pack_folder(source: Path, folder: Path, *, val_fraction: float = 0.1, samples_per_shard: int = 1000) -> bool:
    """A folder of images sorted into one folder per class, as shards; files go in as they are, in hashed order.

    With sub-folders `train` and `val` these are the splits, else ``val_fraction`` of every class is for validation.
    mean and std are estimated from at most 4,096 training images. Returns whether the shards were written now.
    Errors: DataError for a missing or empty source, classes that differ between the splits, an image of the estimate
    that does not decode, or a target that holds something else.
    """
    if _is_packed(folder):
        return False
    if not source.is_dir():
        raise DataError(f"{source}: no such folder of images")
    if (source / "train").is_dir() and (source / "val").is_dir():
        classes, files, labels = _listed(source / "train")
        others, val_files, val_labels = _listed(source / "val")
        if not set(others) <= set(classes):
            extra = ", ".join(sorted(set(others) - set(classes)))
            raise DataError(f"{source}/val has classes that {source}/train lacks: {extra}")
        train, _ = _stratified(labels, {})
        val, _ = _stratified(val_labels, {})
        val_labels = np.array([classes.index(others[label]) for label in val_labels])
    else:
        classes, files, labels = _listed(source)
        sizes = {label: round(val_fraction * int((labels == label).sum())) for label in range(len(classes))}
        train, val = _stratified(labels, sizes)
        val_files, val_labels = files, labels
    splits = {"train": [_file_source(files, labels, number) for number in train]}
    if len(val):
        splits["val"] = [_file_source(val_files, val_labels, number) for number in val]
    statistics = _statistics([files[number] for number in train[:_STATISTICS]])
    _write(folder, source.resolve().name, splits, samples_per_shard, tuple(classes), statistics)
    return True


def _is_packed(folder: Path) -> bool:
    """Whether a folder is a whole data set already; DataError if it is something that must not be overwritten."""
    occupied = folder.is_dir() and any(folder.iterdir())  # asked first: another process may finish in between
    try:
        read_manifest(folder)
    except FileNotFoundError:
        if occupied:
            raise DataError(f"{folder} holds other files and no {NAME}: choose another folder") from None
        return False
    except NotADirectoryError:
        raise DataError(f"{folder} is a file: choose another folder") from None
    return True


def _stratified(labels: np.ndarray, val_sizes: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Samples for training and for validation, each in hashed order so that every shard mixes the classes."""
    order = np.argsort(ranks_of(_PLACE, np.arange(len(labels), dtype=np.int64)), kind="stable")
    is_val = np.zeros(len(labels), dtype=bool)
    for label, count in val_sizes.items():
        is_val[order[labels[order] == label][:count]] = True
    return order[~is_val[order]], order[is_val[order]]


def _listed(source: Path) -> tuple[list[str], list[Path], np.ndarray]:
    """Class names, image files and their labels, sorted by name."""
    names = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((source / name).rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGES and not file.name.startswith(".")
    ]
    empty = set(range(len(names))) - {label for _, label in found}
    if not found or empty:
        which = f"{source / names[min(empty)]}" if empty else f"{source}"
        raise DataError(f"{which} holds no images ({', '.join(IMAGES)}): one folder per class is expected in {source}")
    return names, [file for file, _ in found], np.array([label for _, label in found])


def _file_source(files: Sequence[Path], labels: np.ndarray, number: int) -> _Source:
    file = files[number]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)  # a dot would end the key
    field = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    return _Source(f"{number:08d}_{name}", field, int(labels[number]), file.read_bytes)


def _statistics(files: Iterable[Path]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB pixels in [0, 1] over images, every image with the same weight."""
    first, second = [], []
    for file in files:
        try:
            image = decode(file.read_bytes(), 3)
        except ValueError as error:
            raise DataError(f"{file} does not decode ({error}): repair or remove it") from None
        pixels = np.asarray(image, dtype=np.float64) / 255
        first.append(pixels.mean(axis=(0, 1)))
        second.append((pixels**2).mean(axis=(0, 1)))
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.maximum(np.mean(second, axis=0) - mean**2, 0))
    return tuple(map(float, mean)), tuple(map(float, std))


def _png(grey: np.ndarray) -> bytes:
    """A stored (not deflated) PNG: its size, and so the data set's digest, is the same for every zlib."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="PNG", compress_level=0)
    return stream.getvalue()


def _write(
    folder: Path,
    name: str,
    splits: dict[str, list[_Source]],
    samples_per_shard: int,
    classes: tuple[str, ...],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
    """Write into a draft beside the target and rename it; of two that pack at once, one wins and both are right."""
    draft = folder.with_name(f".{folder.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        entries, indices = {}, []
        for split, sources in splits.items():
            parts = np.array_split(np.arange(len(sources)), -(-len(sources) // samples_per_shard))
            walked, hashes = [], []
            for number, part in enumerate(parts):
                file = draft / f"{split}-{number:06d}.tar"
                hashes.append(_write_shard(file, [sources[at] for at in part]))
                walked.append(index_shard(str(draft), file.name, classes))
                write_index(walked[-1], draft / f"{file.name}.index")
            entries[split] = describe(walked, hashes)
            indices += walked
        mean, std = statistics
        fields = fields_of(indices)
        write_manifest(Manifest(name=name, fields=fields, classes=classes, mean=mean, std=std, splits=entries), draft)
        draft.rename(folder)
    except OSError as error:
        if not _is_packed(folder):
            raise DataError(f"{folder} cannot be packed ({error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_shard(file: Path, sources: Sequence[_Source]) -> str:
    """Write one tar in which nothing depends on when or by whom; its sha256."""
    from webdataset.writer import TarWriter  # 0.3 s of import that only packing needs

    with file.open("wb") as stream, TarWriter(stream, user="", group="", mtime=0, encoder=False, compress=False) as tar:
        for source in sources:
            tar.write({"__key__": source.key, source.field: source.read(), "cls": str(source.label).encode()})
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
