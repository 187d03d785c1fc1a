"""Data sets of images with boxes, from sources of any form."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.image.boxes import BoxReader
from foveal.data.pack.box_member import BOX_FIELD, BoxMember, encode_boxes
from foveal.data.pack.folder import make_file_sample
from foveal.data.pack.image_tree import PassedOver
from foveal.data.pack.label_member import ImageSize
from foveal.data.pack.options import PackOptions
from foveal.data.pack.paired_files import digest_files, name_dataset
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, build_splits, hashed_order
from foveal.data.pack.split_names import split_rank


@dataclass(frozen=True)
class BoxedImages:
    """Images of a split, and per image its annotations and its stated size.

    are_fractions: boxes are centre x, centre y, width, height as fractions of the image's sides, not COCO's.
    """

    split: str | None
    files: list[Path] = field(default_factory=list)
    annotations: list[list[dict[str, Any]]] = field(default_factory=list)
    sizes: list[ImageSize | None] = field(default_factory=list)
    are_fractions: bool = False


def make_box_dataset(
    source: Path,
    classes: tuple[str, ...],
    splits: Sequence[BoxedImages],
    notes: Sequence[str],
    options: PackOptions,
    passed_over: PassedOver,
) -> PackDataset:
    """Return the data set of images with boxes; a single split, train or without a name, is divided."""
    member = BoxMember(BoxReader(BOX_FIELD, classes))
    all_notes = list(notes)
    names = [images.split or "train" for images in splits]
    pack_splits: dict[str, PackSplit] = {}
    for name, images in sorted(zip(names, splits, strict=True), key=lambda pair: split_rank(pair[0])):
        labels = np.full(len(images.files), -1, dtype=np.int64)
        get_sample = partial(_make_sample, images, labels)
        if names == ["train"]:
            pack_splits = build_splits(None, labels, options.val_fraction, get_sample)
            all_notes.append(
                f"one split is given: {1 - options.val_fraction:.0%} of its images are 'train', the others 'val'"
            )
        else:
            order = hashed_order(len(labels))
            pack_splits[name] = PackSplit(order, labels[order], get_sample)
        empty = sum(not boxes for boxes in images.annotations)
        if empty:
            all_notes.append(
                f"split '{name}': {empty:,} of {len(labels):,} images have no box, and train the background"
            )
    all_notes += _describe_shared_files(splits)
    files = [
        (f"{name} {os.path.relpath(file, source)}", file)
        for name, images in zip(names, splits, strict=True)
        for file in images.files
    ]
    digest = digest_files(files, options.workers, [[images.annotations, images.sizes] for images in splits])
    if passed_over.counts:
        all_notes.append(f"passed over: {passed_over.describe()}")
    return PackDataset(
        name_dataset(source), classes, pack_splits, notes=tuple(all_notes), listing=digest, label_member=member
    )


def _make_sample(images: BoxedImages, labels: np.ndarray, number: int) -> PackSample:
    annotations, stated_size = images.annotations[number], images.sizes[number]

    def read_label(size: ImageSize) -> bytes:
        if not images.are_fractions:
            return encode_boxes(annotations, stated_size)
        return encode_boxes([{**each, "bbox": _to_pixels(each["bbox"], size)} for each in annotations], size)

    return replace(make_file_sample(images.files, labels, number), read_label=read_label)


def _describe_shared_files(splits: Sequence[BoxedImages]) -> list[str]:
    counts = Counter(os.path.realpath(file) for images in splits for file in images.files)
    shared = sum(count - 1 for count in counts.values())
    return [f"{shared:,} images are in several splits"] if shared else []


def _to_pixels(box: Sequence[float], size: ImageSize) -> list[float]:
    """Return left, top, width, height in pixels."""
    x, y, width, height = box
    return [(x - width / 2) * size[0], (y - height / 2) * size[1], width * size[0], height * size[1]]
