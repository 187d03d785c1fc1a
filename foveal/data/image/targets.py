"""Labels of samples that are members of a shard: several classes, a mask of classes, or boxes with classes.

One class per image is in the index and needs no reader. Any other label is a member of the sample, which is read with
the image and cropped, flipped and resized like the image. K is the number of classes, H x W the size of the model's
input in pixels.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError, decode_mask_crop
from foveal.data.image.label_drawing import draw_box_outlines, draw_mask
from foveal.data.image.transforms import CropBox
from foveal.errors import DataError

NO_CLASS = -1  # class of ignored pixels and of padding boxes
_OUTSIDE_TOLERANCE = 1.0  # pixels that a box may extend outside its image: annotators round
_MIN_BOX_SIDE = 1.0  # shortest side in pixels of a cropped box; smaller boxes are dropped
_EXAMPLE_BOXES = 16  # boxes of the image that `foveal plan` traces


@dataclass(frozen=True)
class AppliedCrop:
    """Crop of an image of width x height pixels: the box, whether it is flipped, and (H, W) after resizing."""

    image_width: int
    image_height: int
    box: CropBox
    flipped: bool
    output_hw: tuple[int, int]

    @classmethod
    def whole_image(cls, width: int, height: int) -> "AppliedCrop":
        """Return the crop that is the image itself."""
        return cls(width, height, (0, 0, width, height), flipped=False, output_hw=(height, width))


class LabelReader(ABC):
    """Reader of labels that are members of samples. ``field`` is the member that holds the label."""

    field: str

    @abstractmethod
    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        """Return the label of one sample under the crop of its image; ``location`` describes the sample in messages.

        Raises: UndecodableError if the member is an image that does not decode (the sample is then replaced), DataError
        if it is not a valid label.
        """

    @abstractmethod
    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        """Return the label of a row without a sample."""

    def example_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        """Return a label of typical size, for the sample that `foveal plan` traces."""
        return self.empty_label(output_hw)

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        """Return the labels of a microbatch of B rows (None: a row without a sample) as one tensor [B, ...]."""
        empty = self.empty_label(output_hw)
        return _to_pinned_tensor(np.stack([empty if row is None else row for row in labels]))

    def describe_label(self, label: np.ndarray) -> str:
        """Return a label in few words, as a caption of its image."""
        return str(label)

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        """Return an RGB image with its label drawn on it, if a label within an image can be drawn."""
        return image


@dataclass(frozen=True)
class MultiLabelReader(LabelReader):
    """Reader of lists of class numbers: uint8 [K], multi-hot."""

    field: str
    classes: tuple[str, ...]

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        targets = self.empty_label((0, 0))
        for label in _parse_list(data, self.field, "labels", location):
            targets[_check_class(label, len(self.classes), location)] = 1
        return targets

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros(len(self.classes), np.uint8)

    def describe_label(self, label: np.ndarray) -> str:
        return ", ".join(self.classes[number] for number in np.flatnonzero(label)) or "no class"


@dataclass(frozen=True)
class MaskReader(LabelReader):
    """Reader of masks of class numbers: int16 [H, W], the class of each pixel or ``NO_CLASS``."""

    field: str
    classes: tuple[str, ...]
    ignore_id: int | None

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        try:
            size, mask = decode_mask_crop(data, crop.box, crop.flipped, crop.output_hw)
        except UndecodableError as error:
            raise UndecodableError(f"its mask: {error}") from None
        if size != (crop.image_width, crop.image_height):
            raise DataError(
                f"{location} has a mask of {size[0]} x {size[1]} pixels and an image of {crop.image_width} x "
                f"{crop.image_height}: write its shard again"
            )
        if self.ignore_id is not None:
            mask = np.where(mask == self.ignore_id, NO_CLASS, mask)
        if mask.max(initial=0) >= len(self.classes):
            raise DataError(
                f"{location} has id {mask.max()} in its mask, and there are {len(self.classes)} classes; "
                f"data.ignore_id is the id of ignored pixels"
            )
        return mask.astype(np.int16)

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.full(output_hw, NO_CLASS, np.int16)

    def describe_label(self, label: np.ndarray) -> str:
        shares = np.bincount(label[label != NO_CLASS].ravel(), minlength=len(self.classes)) / max(1, label.size)
        largest = [number for number in np.argsort(-shares, kind="stable") if shares[number]]
        return ", ".join(f"{self.classes[number]} {100 * shares[number]:.0f}%" for number in largest) or "no class"

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        return draw_mask(image, label, len(self.classes))


@dataclass(frozen=True)
class BoxReader(LabelReader):
    """Reader of COCO annotations: float32 [n, 5], left, top, right, bottom in pixels of the input, and the class.

    ``bbox`` is left, top, width, height in pixels of the image; boxes with ``iscrowd`` are dropped.
    """

    field: str
    classes: tuple[str, ...]

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        boxes = []
        for annotation in _parse_list(data, self.field, "annotations", location):
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
                    f"{location}: the box {[left, top, width, height]} (left, top, width, height) is not inside its "
                    f"image of {crop.image_width} x {crop.image_height} pixels"
                )
            boxes.append((left, top, right, bottom, _check_class(label, len(self.classes), location)))
        return _crop_boxes(np.array(boxes, np.float64).reshape(-1, 5), crop)

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros((0, 5), np.float32)

    def example_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros((_EXAMPLE_BOXES, 5), np.float32)

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        """Return float32 [B, largest number of boxes, 5]; padding boxes have the class ``NO_CLASS``."""
        max_boxes = max((len(row) for row in labels if row is not None), default=0)
        boxes = np.zeros((len(labels), max_boxes, 5), np.float32)
        boxes[..., 4] = NO_CLASS
        for number, row in enumerate(labels):
            if row is not None:
                boxes[number, : len(row)] = row
        return _to_pinned_tensor(boxes)

    def describe_label(self, label: np.ndarray) -> str:
        counts = Counter(self.classes[int(number)] for number in label[:, 4])
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no box"

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        return draw_box_outlines(image, label, len(self.classes))


def resolve_label_field(cfg: DataConfig, dataset: Dataset, default: str, task: str) -> str:
    """Return the member with the label: ``data.label_field``, or the task's default.

    Raises: DataError if the data set has no such members.
    """
    field, fields = cfg.label_field or default, dataset.manifest.fields
    if field not in fields:
        raise DataError(
            f"{dataset.folder}: task={task} reads members .{field}, and its samples have {', '.join(fields)}: set "
            f"data.label_field"
        )
    return field


def require_class_names(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the data set's classes. Raises: DataError if the manifest has none."""
    if not dataset.classes:
        raise DataError(
            f"{dataset.folder}: its classes have no names: run `foveal data index {dataset.folder} --classes "
            f"NAME,NAME,...` again"
        )
    return dataset.classes


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


def _parse_list(data: bytes, field: str, entry: str, location: str) -> list[Any]:
    """Return the list in a .json member: the whole value, or its ``entry``."""
    try:
        value = json.loads(data)
        labels = value if isinstance(value, list) else value[entry]
    except (ValueError, KeyError, TypeError, RecursionError):
        labels = None
    if not isinstance(labels, list):
        raise DataError(f"{location}: its .{field} is no JSON list, nor an object with a list '{entry}'")
    return labels


def _check_class(label: Any, num_classes: int, location: str) -> int:
    if type(label) is not int or not 0 <= label < num_classes:
        raise DataError(f"{location} has label {label!r}, and labels are 0 to {num_classes - 1}")
    return label


def _to_pinned_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
