"""Labels that are lists of classes: several classes per image. K is the number of classes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveal.data.image.targets import (
    AppliedCrop,
    Finding,
    LabelReader,
    LabelSurvey,
    describe_missing_classes,
    list_names,
    parse_json_list,
    resolve_class,
    shorten,
)
from foveal.errors import DataError


@dataclass(frozen=True)
class MultiLabelReader(LabelReader):
    """Reader of lists of classes, by number or name: uint8 [K], multi-hot. Without ``classes`` any number is one.

    allows_repeats: whether a list may hold a class twice, as in runs before 0.2, which read one-hot lists so.
    """

    field: str
    classes: tuple[str, ...]
    allows_repeats: bool = False

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        targets = self.empty_label((0, 0))
        targets[self.read_classes(data, location)] = 1
        return targets

    def read_classes(self, data: bytes, location: str) -> list[int]:
        """Return the numbers of the classes, each once, in the order of the list. Raises: DataError."""
        labels, _ = parse_json_list(data, self.field, "labels", location)
        are_numbers = all(type(label) is int for label in labels)
        if _is_one_hot(labels, len(self.classes)) and not (self.allows_repeats and are_numbers):
            positions = [number for number, value in enumerate(labels) if value]
            raise DataError(
                f"{location} has the labels {shorten(labels)}, which look one-hot: a value for each of the "
                f"{len(self.classes)} classes, not a list of classes; write {shorten(positions)} in its .{self.field}"
            )
        hint = "; a list holds the numbers or the names of its classes"
        numbers = [resolve_class(label, self.classes, location, hint) for label in labels]
        for number, occurrences in Counter(numbers).items():
            if occurrences > 1 and not self.allows_repeats:
                name = f" ('{self.classes[number]}')" if self.classes else ""
                raise DataError(
                    f"{location} has the labels {shorten(labels)}, which hold class {number}{name} {occurrences} "
                    f"times: a list of classes holds a class once"
                )
        return list(dict.fromkeys(numbers))

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros(len(self.classes), np.uint8)

    def describe_label(self, label: np.ndarray) -> str:
        return ", ".join(self.classes[number] for number in np.flatnonzero(label)) or "no class"

    def make_survey(self) -> LabelSurvey:
        return MultiLabelSurvey(self)


class MultiLabelSurvey(LabelSurvey):
    """Counts over lists of classes."""

    noun = "lists of classes"

    def __init__(self, reader: MultiLabelReader) -> None:
        super().__init__(reader)
        self._lists, self._classes = reader, reader.classes
        self._images_per_class: Counter[int] = Counter()
        self._num_full = 0
        self._orders: set[tuple[int, ...]] = set()  # of the lists that hold all classes

    def read_facts(self, data: bytes, crop: AppliedCrop, location: str) -> list[int]:
        return self._lists.read_classes(data, location)

    def count(self, facts: list[int]) -> None:
        self._images_per_class.update(facts)
        if self._classes and len(facts) == len(self._classes):
            self._num_full += 1
            self._orders.add(tuple(facts))

    def needs_more(self) -> bool:
        return bool(self._classes) and self._num_full in (0, self.num_labels) and len(self._images_per_class) < 2

    def summary(self) -> str:
        return f"{super().summary()}, {sum(self._images_per_class.values()) / max(1, self.num_labels):.2g} classes each"

    def content_findings(self, *, is_complete: bool) -> list[Finding]:
        classes, num = self._classes, self.num_labels
        if not classes:
            return []
        if len(classes) == 2 and self._num_full == num and len(self._orders) == 2:
            sentence = (
                f"all of {num} {self.noun} are [0, 1] or [1, 0], which look one-hot: a value for each of the 2 "
                f"classes; read as lists of classes they give every image both: write [1] and [0] in .{self.field}"
            )
            return [Finding("fault", sentence)]
        if len(classes) > 1 and self._num_full == num:
            hint = ", or is one-hot" if len(classes) == 2 else ""
            return [Finding("untrainable", f"each of {num} {self.noun} holds all classes, {list_names(classes)}{hint}")]
        if not self._images_per_class:
            severity = "untrainable" if is_complete else "note"
            return [Finding(severity, f"none of {num} {self.noun} holds a class")]
        missing = [number for number in range(len(classes)) if number not in self._images_per_class]
        return describe_missing_classes(missing, classes, f"{num} {self.noun}", of="labels")


def _is_one_hot(labels: list[Any], num_classes: int) -> bool:
    """Whether a list has a 0 or 1 for each class and is no list of distinct classes."""
    if not num_classes or len(labels) != num_classes or not all(isinstance(x, int | float) for x in labels):
        return False
    are_class_numbers = all(type(label) is int for label in labels) and len(set(labels)) == len(labels)
    return set(labels) <= {0, 1} and not (are_class_numbers and max(labels) < num_classes)
