"""What a sample's label is: a class, several classes, a mask of classes, or boxes with classes.

A class is in the index. Everything else is a member of the sample, read with the image and seen as the image is seen.
K classes, H x W pixels of what the model sees.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.data.config import DataConfig, LabelKind
from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError, decode_mask_crop
from foveal.data.image.transforms import CropBox
from foveal.errors import DataError

NO_CLASS = -1  # a pixel or a box of no class
_FIELDS: dict[LabelKind, str] = {"classes": "json", "mask": "mask.png", "boxes": "json"}
_ENTRIES: dict[LabelKind, str] = {"classes": "labels", "boxes": "annotations"}
_OUTSIDE_TOLERANCE = 1.0  # pixels that a box may reach outside its image: annotators round
_MIN_BOX_SIDE = 1.0  # pixels of a side that a box must have left in a crop


@dataclass(frozen=True)
class AppliedCrop:
    """How an image of width x height pixels was seen: the box that was cut out, whether flipped, and (H, W) of the result."""

    width: int
    height: int
    box: CropBox
    flipped: bool
    output_hw: tuple[int, int]


@dataclass(frozen=True)
class LabelReader:
    """How the labels of a data set are read. ``classes`` is K."""

    kind: LabelKind
    field: str
    num_classes: int
    ignore_id: int | None

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        """The label of one sample, as its image is seen.

        classes: uint8 [K], 1 where it is of a class. mask: int16 [H, W], the class of each pixel or ``NOTHING``. boxes:
        float32 [n, 5]: left, top, right, bottom in pixels of what is seen, and the class.
        Raises: Undecodable for a mask that is no whole picture, DataError in one sentence for what is no label.
        """
        return _READERS[self.kind](self, data, crop, location)

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        """The labels of a micro-batch, where an empty row has none: [B, K], [B, H, W] or [B, most boxes, 5]."""
        if self.kind != "boxes":
            shape = (self.num_classes,) if self.kind == "classes" else output_hw
            blank = np.zeros(shape, np.uint8) if self.kind == "classes" else np.full(shape, NO_CLASS, np.int16)
            return _to_pinned_tensor(np.stack([blank if row is None else row for row in labels]))
        most = max((len(row) for row in labels if row is not None), default=0)
        boxes = np.zeros((len(labels), most, 5), np.float32)
        boxes[..., 4] = NO_CLASS
        for number, row in enumerate(labels):
            if row is not None:
                boxes[number, : len(row)] = row
        return _to_pinned_tensor(boxes)


def make_label_reader(cfg: DataConfig, dataset: Dataset) -> LabelReader | None:
    """How the labels of a set with these kinds of members are read; nothing where the index has them all.

    Raises: DataError where no sample can have one.
    """
    if cfg.labels == "class":
        return None
    field, where, fields = cfg.label_field or _FIELDS[cfg.labels], dataset.folder, dataset.manifest.fields
    if field not in fields:
        raise DataError(
            f"{where}: data.labels={cfg.labels} reads members .{field}, and its samples have {', '.join(fields)}: set "
            f"data.label_field"
        )
    if not dataset.classes:
        raise DataError(
            f"{where}: its classes have no names: run `foveal data index {where} --classes NAME,NAME,...` again"
        )
    return LabelReader(cfg.labels, field, len(dataset.classes), cfg.ignore_id)


def _read_classes(labels: LabelReader, data: bytes, _seen: AppliedCrop, where: str) -> np.ndarray:
    listed = _parse_list(labels, data, where)
    row = np.zeros(labels.num_classes, np.uint8)
    for label in listed:
        row[_check_class(labels, label, where)] = 1
    return row


def _read_mask(labels: LabelReader, data: bytes, seen: AppliedCrop, where: str) -> np.ndarray:
    try:
        size, mask = decode_mask_crop(data, seen.box, seen.flipped, seen.output_hw)
    except UndecodableError as error:
        raise UndecodableError(f"its mask: {error}") from None
    if size != (seen.width, seen.height):
        raise DataError(
            f"{where} has a mask of {size[0]} x {size[1]} pixels and an image of {seen.width} x {seen.height}: write its "
            f"shard again"
        )
    if labels.ignore_id is not None:
        mask = np.where(mask == labels.ignore_id, NO_CLASS, mask)
    if mask.max(initial=0) >= labels.num_classes:
        raise DataError(
            f"{where} has id {mask.max()} in its mask, and there are {labels.num_classes} classes; data.ignore_id is the id "
            f"of what is to be left out"
        )
    return mask.astype(np.int16)


def _read_boxes(labels: LabelReader, data: bytes, seen: AppliedCrop, where: str) -> np.ndarray:
    """COCO's annotations: bbox as left, top, width, height in pixels of the image, and category_id; crowds are left out."""
    found = []
    for each in _parse_list(labels, data, where):
        try:
            left, top, width, height = (float(number) for number in each["bbox"])
            label, crowd = each["category_id"], each.get("iscrowd", 0)
        except (TypeError, KeyError, ValueError, OverflowError):
            raise DataError(f"{where}: {str(each)[:60]} is no box with bbox and category_id as COCO has them") from None
        if crowd not in (0, 1):
            raise DataError(f"{where}: {str(each)[:60]} has iscrowd {crowd!r:.20}, which is 0 or 1")
        if crowd:
            continue
        right, bottom = left + width, top + height
        outside = (
            min(left, top) < -_OUTSIDE_TOLERANCE
            or right > seen.width + _OUTSIDE_TOLERANCE
            or bottom > seen.height + _OUTSIDE_TOLERANCE
        )
        if outside or not (width > 0 and height > 0 and isfinite(left + top)):
            raise DataError(
                f"{where}: the box {[left, top, width, height]} (left, top, width, height) is not inside its image of "
                f"{seen.width} x {seen.height} pixels"
            )
        found.append((left, top, right, bottom, _check_class(labels, label, where)))
    return _crop_boxes(np.array(found, np.float64).reshape(-1, 5), seen)


def _crop_boxes(boxes: np.ndarray, seen: AppliedCrop) -> np.ndarray:
    """Boxes of the image in pixels of what is seen of it, clipped; what has nothing left is dropped."""
    left, top, right, bottom = (round(edge) for edge in seen.box)
    down, across = seen.output_hw[0] / max(1, bottom - top), seen.output_hw[1] / max(1, right - left)
    boxes[:, [0, 2]] = ((boxes[:, [0, 2]] - left) * across).clip(0, seen.output_hw[1])
    boxes[:, [1, 3]] = ((boxes[:, [1, 3]] - top) * down).clip(0, seen.output_hw[0])
    if seen.flipped:
        boxes[:, [0, 2]] = seen.output_hw[1] - boxes[:, [2, 0]]
    left_over = (boxes[:, 2] - boxes[:, 0] >= _MIN_BOX_SIDE) & (boxes[:, 3] - boxes[:, 1] >= _MIN_BOX_SIDE)
    return boxes[left_over].astype(np.float32)


def _parse_list(labels: LabelReader, data: bytes, where: str) -> list[Any]:
    """The list in a .json member: all of it, or under the name that lists of this kind have."""
    name = _ENTRIES[labels.kind]
    try:
        told = json.loads(data)
        told = told if isinstance(told, list) else told[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        told = None
    if not isinstance(told, list):
        raise DataError(f"{where}: its .{labels.field} is no JSON list, nor an object with a list '{name}'")
    return told


def _check_class(labels: LabelReader, label: Any, where: str) -> int:
    if type(label) is not int or not 0 <= label < labels.num_classes:
        raise DataError(f"{where} has label {label!r}, and labels are 0 to {labels.num_classes - 1}")
    return label


def _to_pinned_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


_READERS: dict[LabelKind, Callable[[LabelReader, bytes, AppliedCrop, str], np.ndarray]] = {
    "classes": _read_classes,
    "mask": _read_mask,
    "boxes": _read_boxes,
}
