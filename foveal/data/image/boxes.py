"""Labels that are boxes with classes: COCO annotations. K is the number of classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from foveal.data.image.annotated_image import check_annotated_image
from foveal.data.image.decode import DECODE_VERSION
from foveal.data.image.label_drawing import draw_box_outlines
from foveal.data.image.targets import (
    NO_CLASS,
    AppliedCrop,
    Finding,
    LabelReader,
    LabelSurvey,
    describe_missing_classes,
    parse_json_list,
    resolve_class,
    to_pinned_tensor,
)
from foveal.errors import DataError

_OUTSIDE_TOLERANCE = 1.0  # pixels that a box may extend outside its image: annotators round
_MIN_BOX_SIDE = 1.0  # shortest side in pixels of a cropped box; smaller boxes are dropped
_EXAMPLE_BOXES = 16  # boxes of the image that `foveal plan` traces
_MIN_SURVEYED = 4  # boxes from which on their numbers show what they mean
_CORNERS_OUTSIDE = 0.2  # share of boxes outside that shows right and bottom in place of width and height
_MOSTLY_OUTSIDE = 0.5  # share of boxes outside that shows numbers of another meaning

BoxState = Literal["inside", "clipped", "outside", "empty", "crowd"]
_STATE_PHRASES: dict[BoxState, str] = {
    "clipped": "reach outside their image and are clipped",
    "outside": "are wholly outside their image and are left out",
    "empty": "have no area and are left out",
    "crowd": "are crowds and are left out",
}


@dataclass(frozen=True)
class ImageBoxes:
    """Boxes of an image as they are annotated: left, top, width, height in pixels; ``states`` and ``classes`` by box."""

    bboxes: list[tuple[float, float, float, float]]
    states: list[BoxState]
    classes: list[int]


@dataclass(frozen=True)
class BoxReader(LabelReader):
    """Reader of COCO annotations: float32 [n, 5], left, top, right, bottom in pixels of the input, and the class.

    ``bbox`` is left, top, width, height in pixels of the image. Crowds (``iscrowd``) and boxes without area within the
    image are left out, and boxes that reach outside are clipped. Without ``classes`` any number is a class.
    decode_version: the rules of reading (``data.decode_version``); those of 1 did not ask whether annotations are of
    this image.
    """

    field: str
    classes: tuple[str, ...]
    decode_version: int = DECODE_VERSION

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        boxes = self.read_boxes(data, crop, location)
        rows = [
            (left, top, left + width, top + height, label)
            for (left, top, width, height), state, label in zip(boxes.bboxes, boxes.states, boxes.classes, strict=True)
            if state in ("inside", "clipped")
        ]
        return _crop_boxes(np.array(rows, np.float64).reshape(-1, 5), crop)

    def read_boxes(self, data: bytes, crop: AppliedCrop, location: str) -> ImageBoxes:
        """Return the boxes of an image. Raises: DataError if an annotation is no box, or not one of this image."""
        boxes = ImageBoxes([], [], [])
        annotations, holder = parse_json_list(data, self.field, "annotations", location)
        for annotation in annotations:
            try:
                left, top, width, height = bbox = tuple(float(number) for number in annotation["bbox"])
                label, crowd = annotation["category_id"], annotation.get("iscrowd", 0)
            except (TypeError, KeyError, ValueError, OverflowError):
                raise DataError(
                    f"{location}: {str(annotation)[:60]} is no box with bbox and category_id as in COCO"
                ) from None
            if crowd not in (0, 1):
                raise DataError(f"{location}: {str(annotation)[:60]} has iscrowd {crowd!r:.20}, which is 0 or 1")
            if crowd:
                number = NO_CLASS  # a crowd is left out whatever its class and its box
            else:
                _check_bbox(bbox, crop, location)
                number = resolve_class(label, self.classes, location, _category_hint(label, len(self.classes)))
            boxes.bboxes.append((left, top, width, height))
            boxes.states.append("crowd" if crowd else _place_box(bbox, crop))
            boxes.classes.append(number)
        if self.decode_version > 1:
            check_annotated_image(annotations, holder, crop, location)
            _check_fractions(boxes, crop, location)
        return boxes

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
        return to_pinned_tensor(boxes)

    def describe_label(self, label: np.ndarray) -> str:
        counts = Counter(self.classes[int(number)] for number in label[:, 4])
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no box"

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        return draw_box_outlines(image, label, len(self.classes))

    def make_survey(self) -> LabelSurvey:
        return BoxSurvey(self)


class BoxSurvey(LabelSurvey):
    """Counts of boxes by class, and by their place in the image."""

    noun = "lists of boxes"

    def __init__(self, reader: BoxReader) -> None:
        super().__init__(reader)
        self._boxes, self._classes = reader, reader.classes
        self._states: Counter[BoxState] = Counter()
        self._boxes_per_class: Counter[int] = Counter()
        self._num_corners = 0  # boxes whose numbers are also left, top, right, bottom within the image
        self._num_fractions = 0  # boxes whose numbers are all in [0, 1]
        self._num_small = 0  # boxes with a side below a pixel

    def read_facts(self, data: bytes, crop: AppliedCrop, location: str) -> tuple[ImageBoxes, AppliedCrop]:
        return self._boxes.read_boxes(data, crop, location), crop

    def count(self, facts: tuple[ImageBoxes, AppliedCrop]) -> None:
        boxes, crop = facts
        self._states.update(boxes.states)
        for (left, top, width, height), state, label in zip(boxes.bboxes, boxes.states, boxes.classes, strict=True):
            if state == "crowd":
                continue
            fits = width <= crop.image_width + _OUTSIDE_TOLERANCE and height <= crop.image_height + _OUTSIDE_TOLERANCE
            self._num_corners += left < width and top < height and min(left, top) >= -_OUTSIDE_TOLERANCE and fits
            self._num_fractions += all(0 <= number <= 1 for number in (left, top, width, height))
            if state != "empty":
                self._num_small += min(width, height) < _MIN_BOX_SIDE
            if state in ("inside", "clipped"):
                self._boxes_per_class[label] += 1

    def needs_more(self) -> bool:
        return not self._boxes_per_class

    def summary(self) -> str:
        return f"{super().summary()}, {sum(self._boxes_per_class.values()):,} boxes"

    def content_findings(self, *, is_complete: bool) -> list[Finding]:
        total = sum(self._states.values()) - self._states["crowd"]
        scope = f"{total} boxes"
        outside = self._states["clipped"] + self._states["outside"]
        if total and self._num_fractions == total:
            sentence = f"all numbers of {scope} are within 0 and 1, as fractions of the image: bbox is in pixels"
            return [Finding("fault", sentence)]
        if total >= _MIN_SURVEYED and outside > _CORNERS_OUTSIDE * total and self._num_corners == total:
            return [Finding("fault", f"{_meaning(outside, scope)}: these look like left, top, right, bottom")]
        if total >= _MIN_SURVEYED and outside > _MOSTLY_OUTSIDE * total:
            return [Finding("fault", _meaning(outside, scope))]
        notes = [
            f"{self._states[state]} of {sum(self._states.values())} boxes {phrase}"
            for state, phrase in _STATE_PHRASES.items()
            if self._states[state]
        ]
        if self._num_small:
            notes.append(f"{self._num_small} of {scope} have a side below a pixel and are left out")
        if not self._boxes_per_class:
            sentence = f"none of {self.num_labels} {self.noun} has a box to learn"
            return [Finding("untrainable" if is_complete else "note", sentence), *_as_notes(notes)]
        missing = [number for number in range(len(self._classes)) if number not in self._boxes_per_class]
        return _as_notes(notes) + describe_missing_classes(missing, self._classes, scope, of="category ids")


def _as_notes(sentences: Sequence[str]) -> list[Finding]:
    return [Finding("note", sentence) for sentence in sentences]


def _meaning(outside: int, scope: str) -> str:
    return f"{outside} of {scope} reach outside their image, and bbox is left, top, width, height in pixels"


def _category_hint(label: Any, num_classes: int) -> str:
    if type(label) is int and label >= num_classes:
        return (
            "; category_id is the place of the class in the list of names, from 0 (COCO's own ids begin at 1 and have "
            "gaps)"
        )
    return "; category_id is the number or the name of a class"


def _check_bbox(bbox: Sequence[float], crop: AppliedCrop, location: str) -> None:
    """Raise DataError if a box has a number that is not finite, or a negative side."""
    _, _, width, height = bbox
    if not all(isfinite(number) for number in bbox):
        raise DataError(
            f"{location}: the box {list(bbox)} (left, top, width, height) has a number that is not finite, so it is not "
            f"inside its image of {crop.image_width} x {crop.image_height} pixels"
        )
    if width < 0 or height < 0:
        raise DataError(
            f"{location}: the box {list(bbox)} has a negative side: bbox is left, top, width, height in pixels"
        )


def _check_fractions(boxes: ImageBoxes, crop: AppliedCrop, location: str) -> None:
    """Raise DataError if the boxes of an image, several, are fractions of it: a single one may be a speck."""
    real = [bbox for bbox, state in zip(boxes.bboxes, boxes.states, strict=True) if state != "crowd"]
    numbers = [number for bbox in real for number in bbox]
    if len(real) > 1 and all(0 <= number <= 1 for number in numbers) and not all(map(float.is_integer, numbers)):
        raise DataError(
            f"{location}: all numbers of its {len(real)} boxes are within 0 and 1, as fractions of the image, and bbox is "
            f"left, top, width, height in pixels of an image of {crop.image_width} x {crop.image_height}"
        )


def _place_box(bbox: Sequence[float], crop: AppliedCrop) -> BoxState:
    """Return where a box is in its image."""
    left, top, width, height = bbox
    right, bottom = left + width, top + height
    if not (width > 0 and height > 0):
        return "empty"
    if right <= 0 or bottom <= 0 or left >= crop.image_width or top >= crop.image_height:
        return "outside"
    is_outside = (
        min(left, top) < -_OUTSIDE_TOLERANCE
        or right > crop.image_width + _OUTSIDE_TOLERANCE
        or bottom > crop.image_height + _OUTSIDE_TOLERANCE
    )
    return "clipped" if is_outside else "inside"


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
