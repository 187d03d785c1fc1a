"""Which members of samples hold labels, by their names and their content, where no task says it."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import ShardIndex
from foveal.data.image.boxes import BoxReader
from foveal.data.image.class_lists import MultiLabelReader
from foveal.data.image.masks import MaskReader
from foveal.data.image.targets import LabelReader
from foveal.errors import DataError

# Words of a member's name, between its dots, dashes and underscores, that say that it is a mask of ids.
_MASK_WORDS = {"mask", "masks", "seg", "segm", "segmentation", "semseg", "semantic", "gt", "trimap"}
_MASK_WORDS |= {"label", "labels", "labelmap", "labelids", "labeltrainids", "annotation", "annotations", "annot"}
_MASK_EXTENSIONS = {"png", "tif", "tiff", "bmp", "pgm", "gif", "jpg", "jpeg", "webp"}
_LOOKED_AT = 16  # samples whose JSON shows what it holds; the first may have no object


@dataclass(frozen=True)
class LabelMembers:
    """Readers of the members that are taken for labels, and the fields of which nothing is known."""

    readers: tuple[LabelReader, ...]
    unread_fields: tuple[str, ...]


def is_mask_field(field: str) -> bool:
    """Whether the name of a member says that it is a mask of class ids."""
    *words, extension = re.split(r"[._-]", field.lower())
    return extension in _MASK_EXTENSIONS and not _MASK_WORDS.isdisjoint(words)


def find_label_members(dataset: Dataset, ignore_id: int | None) -> LabelMembers:
    """Return readers of a data set's masks, boxes and lists of classes.

    They know the classes of the manifest unless these are the classes of whole images. A shard or index that cannot be
    read is left to ``verify``, which names it.
    """
    fields = dataset.manifest.fields
    indices = list(_iter_first_indices(dataset))
    classes = () if any((index.labels >= 0).any() for index in indices) else dataset.classes or ()
    readers: list[LabelReader] = []
    unread = []
    read_by_index = {"cls"} | ({"json"} if any(index.rules["label_key"] for index in indices) else set())
    image_fields = {name for index in indices for name in index.image_fields()}
    for field in fields:
        found: list[LabelReader] = []
        if is_mask_field(field):
            found = [MaskReader(field, classes, ignore_id)]
        elif field.rpartition(".")[2] == "json":
            found = _json_readers(field, classes, list(_iter_json(dataset, indices, field)))
        readers += found
        if not found and field not in {*read_by_index, *image_fields}:
            unread.append(field)
    return LabelMembers(tuple(readers), tuple(unread))


def describe_fields(fields: Sequence[str], label_key: str | None) -> list[str]:
    """Return a line for each kind of label that members may hold, by their names alone."""
    lines = []
    if masks := [field for field in fields if is_mask_field(field)]:
        option = "" if masks == ["mask.png"] else f" data.label_field={masks[0]}"
        lines.append(f"masks of class ids by their name: .{', .'.join(masks)}: task=segmentation{option}")
    if "json" in fields and label_key is None:
        lines.append(
            ".json was not read: it may hold boxes (task=detection), lists of classes (task=multilabel), or a class of "
            "the image (--label-key ENTRY)"
        )
    return lines


def _json_readers(field: str, classes: tuple[str, ...], values: Sequence[Any]) -> list[LabelReader]:
    """Return the readers of what the first samples' JSON holds."""
    readers: list[LabelReader] = []
    if any(_has_boxes(value) for value in values):
        readers.append(BoxReader(field, classes))
    if classes and any(_has_classes(value, classes) for value in values):
        readers.append(MultiLabelReader(field, classes))
    return readers


def _has_boxes(value: Any) -> bool:
    entries = value.get("annotations") if isinstance(value, dict) else value
    return isinstance(entries, list) and any(isinstance(entry, dict) and "bbox" in entry for entry in entries)


def _has_classes(value: Any, classes: tuple[str, ...]) -> bool:
    """Whether JSON has a list of classes, or classes in another form, which the reader then refuses by name."""
    entries = value.get("labels", value) if isinstance(value, dict) else value
    known = {*classes, *map(str, range(len(classes)))}
    if isinstance(entries, list):
        nested = [str(label) for entry in entries if isinstance(entry, list) for label in entry]
        is_nested = isinstance(value, dict) and bool(nested) and known.issuperset(nested)
        return is_nested or any(isinstance(entry, int | float | str) for entry in entries)
    if type(entries) is int or isinstance(entries, str):
        names = re.split(r"[\s,;|]+", str(entries).strip())
    else:
        names = list(entries) if isinstance(entries, dict) else []
    return bool(names) and known.issuperset(names)


def _iter_json(dataset: Dataset, indices: Sequence[ShardIndex], field: str) -> Iterator[Any]:
    """Yield the JSON of the first samples of each split that have such a member."""
    for index in indices:
        for row in range(min(_LOOKED_AT, len(index))):
            with contextlib.suppress(ValueError, RecursionError, DataError):
                member = index.find_member_offset_size(row, field)
                if member is not None:
                    yield json.loads(dataset.read_range(index.shard, *member))


def _iter_first_indices(dataset: Dataset) -> Iterator[ShardIndex]:
    for split, entry in dataset.manifest.splits.items():
        if entry.shards:
            with contextlib.suppress(DataError):
                yield dataset.shard_index(split, 0)
