"""Labels of samples: a class, several classes, a mask of classes, or boxes with classes.

A class is in the index. Any other label is a member of the sample, which is read with the image and cropped, flipped
and resized like the image. K is the number of classes, H x W the size of the model's input in pixels.
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

NO_CLASS = -1  # class of ignored pixels and of padding boxes
_FIELDS: dict[LabelKind, str] = {"classes": "json", "mask": "mask.png", "boxes": "json"}
_ENTRIES: dict[LabelKind, str] = {"classes": "labels", "boxes": "annotations"}
_OUTSIDE_TOLERANCE = 1.0  # pixels that a box may extend outside its image: annotators round
_MIN_BOX_SIDE = 1.0  # shortest side in pixels of a cropped box; smaller boxes are dropped


@dataclass(frozen=True)
class AppliedCrop:
    """Crop of an image of width x height pixels: the box, whether it is flipped, and (H, W) after resizing."""

    image_width: int
    image_height: int
    box: CropBox
    flipped: bool
    output_hw: tuple[int, int]


@dataclass(frozen=True)
class LabelReader:
    """Reader of a data set's labels. ``field`` is the member with the label; ``num_classes`` is K."""

    kind: LabelKind
    field: str
    num_classes: int
    ignore_id: int | None

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        """Return the label of one sample under the crop of its image.

        classes: uint8 [K], multi-hot. mask: int16 [H, W], the class of each pixel or ``NO_CLASS``. boxes: float32
        [n, 5]: left, top, right, bottom in pixels of the model's input, and the class.
        Raises: UndecodableError if a mask does not decode, DataError if the member is not a valid label.
        """
        return _READERS[self.kind](self, data, crop, location)

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        """Stack the labels of a microbatch (None: no label): [B, K], [B, H, W] or [B, largest number of boxes, 5]."""
        if self.kind != "boxes":
            if self.kind == "classes":
                empty = np.zeros((self.num_classes,), np.uint8)
            else:
                empty = np.full(output_hw, NO_CLASS, np.int16)
            return _to_pinned_tensor(np.stack([empty if row is None else row for row in labels]))
        max_boxes = max((len(row) for row in labels if row is not None), default=0)
        boxes = np.zeros((len(labels), max_boxes, 5), np.float32)
        boxes[..., 4] = NO_CLASS
        for number, row in enumerate(labels):
            if row is not None:
                boxes[number, : len(row)] = row
        return _to_pinned_tensor(boxes)


def make_label_reader(cfg: DataConfig, dataset: Dataset) -> LabelReader | None:
    """Return the reader of a data set's labels, or None if the index has the labels.

    Raises: DataError if the data set has no such members, or no class names.
    """
    if cfg.labels == "class":
        return None
    field, fields = cfg.label_field or _FIELDS[cfg.labels], dataset.manifest.fields
    if field not in fields:
        raise DataError(
            f"{dataset.folder}: data.labels={cfg.labels} reads members .{field}, and its samples have "
            f"{', '.join(fields)}: set data.label_field"
        )
    if not dataset.classes:
        raise DataError(
            f"{dataset.folder}: its classes have no names: run `foveal data index {dataset.folder} --classes "
            f"NAME,NAME,...` again"
        )
    return LabelReader(cfg.labels, field, len(dataset.classes), cfg.ignore_id)


def _read_classes(reader: LabelReader, data: bytes, _crop: AppliedCrop, location: str) -> np.ndarray:
    targets = np.zeros(reader.num_classes, np.uint8)
    for label in _parse_list(reader, data, location):
        targets[_check_class(reader, label, location)] = 1
    return targets


def _read_mask(reader: LabelReader, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
    try:
        size, mask = decode_mask_crop(data, crop.box, crop.flipped, crop.output_hw)
    except UndecodableError as error:
        raise UndecodableError(f"its mask: {error}") from None
    if size != (crop.image_width, crop.image_height):
        raise DataError(
            f"{location} has a mask of {size[0]} x {size[1]} pixels and an image of {crop.image_width} x {crop.image_height}: "
            f"write its shard again"
        )
    if reader.ignore_id is not None:
        mask = np.where(mask == reader.ignore_id, NO_CLASS, mask)
    if mask.max(initial=0) >= reader.num_classes:
        raise DataError(
            f"{location} has id {mask.max()} in its mask, and there are {reader.num_classes} classes; "
            f"data.ignore_id is the id of ignored pixels"
        )
    return mask.astype(np.int16)


def _read_boxes(reader: LabelReader, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
    """Read COCO annotations: bbox is left, top, width, height in pixels of the image; iscrowd boxes are dropped."""
    boxes = []
    for annotation in _parse_list(reader, data, location):
        try:
            left, top, width, height = (float(number) for number in annotation["bbox"])
            label, crowd = annotation["category_id"], annotation.get("iscrowd", 0)
        except (TypeError, KeyError, ValueError, OverflowError):
            raise DataError(
                f"{location}: {str(annotation)[:60]} is no box with bbox and category_id as in COCO"
            ) from None
        if crowd not in (0, 1):
            raise DataError(f"{location}: {str(annotation)[:60]} has iscrowd {crowd!r:.20}, which is 0 or 1")
        if crowd:
            continue
        right, bottom = left + width, top + height
        outside = (
            min(left, top) < -_OUTSIDE_TOLERANCE
            or right > crop.image_width + _OUTSIDE_TOLERANCE
            or bottom > crop.image_height + _OUTSIDE_TOLERANCE
        )
        if outside or not (width > 0 and height > 0 and isfinite(left + top)):
            raise DataError(
                f"{location}: the box {[left, top, width, height]} (left, top, width, height) is not inside its image "
                f"of {crop.image_width} x {crop.image_height} pixels"
            )
        boxes.append((left, top, right, bottom, _check_class(reader, label, location)))
    return _crop_boxes(np.array(boxes, np.float64).reshape(-1, 5), crop)


def _crop_boxes(boxes: np.ndarray, crop: AppliedCrop) -> np.ndarray:
    """Convert boxes from image pixels to input pixels, clip them, and drop boxes without visible area."""
    left, top, right, bottom = (round(edge) for edge in crop.box)
    height, width = crop.output_hw
    x_scale, y_scale = width / max(1, right - left), height / max(1, bottom - top)
    boxes[:, [0, 2]] = ((boxes[:, [0, 2]] - left) * x_scale).clip(0, width)
    boxes[:, [1, 3]] = ((boxes[:, [1, 3]] - top) * y_scale).clip(0, height)
    if crop.flipped:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    visible = (boxes[:, 2] - boxes[:, 0] >= _MIN_BOX_SIDE) & (boxes[:, 3] - boxes[:, 1] >= _MIN_BOX_SIDE)
    return boxes[visible].astype(np.float32)


def _parse_list(reader: LabelReader, data: bytes, location: str) -> list[Any]:
    """Return the list in a .json member: the whole value, or the entry that holds labels of this kind."""
    entry = _ENTRIES[reader.kind]
    try:
        value = json.loads(data)
        labels = value if isinstance(value, list) else value[entry]
    except (ValueError, KeyError, TypeError, RecursionError):
        labels = None
    if not isinstance(labels, list):
        raise DataError(f"{location}: its .{reader.field} is no JSON list, nor an object with a list '{entry}'")
    return labels


def _check_class(reader: LabelReader, label: Any, location: str) -> int:
    if type(label) is not int or not 0 <= label < reader.num_classes:
        raise DataError(f"{location} has label {label!r}, and labels are 0 to {reader.num_classes - 1}")
    return label


def _to_pinned_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


_READERS: dict[LabelKind, Callable[[LabelReader, bytes, AppliedCrop, str], np.ndarray]] = {
    "classes": _read_classes,
    "mask": _read_mask,
    "boxes": _read_boxes,
}
