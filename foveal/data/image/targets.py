"""Labels of samples that are members of a shard: what a reader of labels does, and what a survey counts.

One class per image is in the index and needs no reader. Any other label is a member of the sample, which is read with
the image and cropped, flipped and resized like the image: ``class_lists``, ``masks`` and ``boxes`` have the readers.
"""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError
from foveal.data.image.transforms import CropBox
from foveal.errors import DataError

NO_CLASS = -1  # class of ignored pixels and of padding boxes
_MAX_LISTED = 5  # names in a sentence
_MAX_QUOTED = 60  # characters of a value in a sentence


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

    @property
    def has_fixed_shape(self) -> bool:
        """Whether every label has the shape and type of ``empty_label``, and a microbatch is their stack."""
        return type(self).collate is LabelReader.collate

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        """Return the labels of a microbatch of B rows (None: a row without a sample) as one tensor [B, ...]."""
        empty = self.empty_label(output_hw)
        return to_pinned_tensor(np.stack([empty if row is None else row for row in labels]))

    def make_survey(self) -> "LabelSurvey":
        """Return an empty survey of such labels."""
        return LabelSurvey(self)

    def describe_label(self, label: np.ndarray) -> str:
        """Return a label in few words, as a caption of its image."""
        return str(label)

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        """Return an RGB image with its label drawn on it, if a label within an image can be drawn."""
        return image


@dataclass(frozen=True)
class Finding:
    """What labels show as a whole. ``sentence`` continues the name of their data set.

    severity: "fault" if they cannot be meant as they are read, "untrainable" if nothing can be learned from them,
    "note" if they may be right.
    """

    severity: Literal["fault", "untrainable", "note"]
    sentence: str


class LabelSurvey:
    """Counts over the labels of a data set, or over some of them. Thread-safe."""

    noun = "labels"

    def __init__(self, reader: LabelReader) -> None:
        self.field = reader.field
        self.num_labels = 0
        self.num_missing = 0
        self.num_undecodable = 0
        self._first_undecodable = ""
        self._reader = reader
        self._lock = threading.Lock()

    def add(self, data: bytes, image_size: tuple[int, int], location: str) -> None:
        """Read the label of a sample whose image has this (width, height), and count it.

        Raises: UndecodableError, DataError, as ``LabelReader.read_label``.
        """
        try:
            facts = self.read_facts(data, AppliedCrop.whole_image(*image_size), location)
        except UndecodableError as error:
            with self._lock:
                self.num_undecodable += 1
                self._first_undecodable = self._first_undecodable or f"{location}: {error}"
            raise
        with self._lock:
            self.num_labels += 1
            self.count(facts)

    def add_missing(self) -> None:
        """Count a sample that has no such label."""
        with self._lock:
            self.num_missing += 1

    def read_facts(self, data: bytes, crop: AppliedCrop, location: str) -> Any:
        """Read a label completely and return what ``count`` needs of it. Raises: as ``LabelReader.read_label``."""
        return self._reader.read_label(data, crop, location)

    def count(self, facts: Any) -> None:
        """Count a label. One thread at a time calls it."""

    def needs_more(self) -> bool:
        """Return whether more labels may change the findings: nothing that can be learned has been met so far."""
        return False

    def summary(self) -> str:
        """Return what the labels hold, as a line."""
        return f"{self.num_labels} {self.noun}"

    def findings(self, *, is_complete: bool) -> list[Finding]:
        """Return what the labels show; is_complete: they are all labels of a split, not some of them."""
        findings = []
        if self.num_undecodable:
            most = self.num_undecodable > self.num_labels
            sentence = (
                f"{self.num_undecodable} of {self.num_undecodable + self.num_labels} {self.noun} do not decode, the "
                f"first: {self._first_undecodable}"
            )
            findings.append(Finding("fault" if most else "note", sentence))
        return findings + (self.content_findings(is_complete=is_complete) if self.num_labels else [])

    def content_findings(self, *, is_complete: bool) -> list[Finding]:
        """Return what the labels that decode show; there is at least one."""
        return []


def describe_missing_classes(missing: Sequence[int], classes: Sequence[str], scope: str, *, of: str) -> list[Finding]:
    """Return a note of the classes that ``scope`` (labels) lacks; ``of``: what numbers them, such as "mask ids"."""
    if not missing:
        return []
    hint = f"; {of} count from 0, in the order of the class names" if 0 in missing else ""
    word = "class" if len(missing) == 1 else "classes"
    return [Finding("note", f"{word} {list_names(classes[number] for number in missing)}: in none of {scope}{hint}")]


def list_names(names: Iterable[str]) -> str:
    """Return quoted names, the first few of many."""
    quoted = [f"'{name}'" for name in names]
    rest = len(quoted) - _MAX_LISTED
    return ", ".join(quoted[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


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


def parse_json_list(data: bytes, field: str, entry: str, location: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the list in a .json member, which is the whole value or its ``entry``, and the object that holds it.

    The object is empty if the list is the whole value. Raises: DataError that says what the member holds instead.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value, held = None, "it is no JSON"
    else:
        if isinstance(value, list):
            return value, {}
        if isinstance(value, dict) and isinstance(value.get(entry), list):
            return value[entry], value
        held = _describe_json(value, entry)
    raise DataError(f"{location}: its .{field} is no JSON list, nor an object with a list '{entry}': {held}")


def _describe_json(value: Any, entry: str) -> str:
    """Return what a JSON value holds in place of a list, for the end of a sentence."""
    if not isinstance(value, dict):
        return f"it is {shorten(value)}"
    if entry in value:
        return f"its '{entry}' is {shorten(value[entry])}"
    return f"its entries are {list_names(value)}" if value else "it is empty"


def shorten(value: Any) -> str:
    """Return a value as text of at most 60 characters and an ellipsis."""
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


def explain_turned_size(stated: tuple[float, float], crop: AppliedCrop) -> str:
    """Return the end of a sentence about a (width, height) that is not the image's: a turned image, or nothing."""
    if stated != (crop.image_height, crop.image_width):
        return ""
    return (
        "; these are its sides exchanged: the label was made for the stored pixels, and the image is turned upright by its "
        "EXIF orientation: turn the label too, or store the image upright and without that tag"
    )


def resolve_class(label: Any, classes: Sequence[str], location: str, hint: str = "") -> int:
    """Return the number of a class, given by number or by name. Without ``classes``, their number is not known.

    Raises: DataError, whose sentence ends with ``hint``.
    """
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    limit = len(classes) or np.iinfo(np.int32).max
    if type(label) is not int or not 0 <= label < limit:
        raise DataError(f"{location} has label {shorten(label)}, and labels are 0 to {limit - 1}{hint}")
    return label


def to_pinned_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, pinned if CUDA is available."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
