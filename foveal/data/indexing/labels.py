"""Labels of samples: the number or class name in a `.cls` or `.json` member."""

import codecs
import functools
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from foveal.data.indexing.numeric_labels import NAMES, NUMBER, POSITIONS, LabelMismatchError, values_of_names
from foveal.errors import DataError

MAX_LABEL_BYTES = 256  # read of a .cls member
MAX_JSON_BYTES = 1 << 24  # read of a .json member

_TEXT_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_REWRITE = "write the shard again with the label as digits"


@functools.lru_cache(maxsize=4)  # a parser is made for each of many shards
def _build_tables(classes: tuple[str, ...]) -> tuple[dict[str, int], dict[int, int], bool]:
    """Return labels by normalized name, labels by the number that a name is, and whether these numbers are distinct."""
    values = values_of_names(classes)
    label_of_value = {value: label for label, value in values.items()}
    names = {normalize_name(name): label for label, name in enumerate(classes)}
    return names, label_of_value, len(label_of_value) == len(values)


class LabelParser:
    """Parser of the labels of one shard, at ``location``.

    classes: class names, by label, which labels may be; names match in any Unicode normal form. label_key: the entry of
    a `.json` member that is the label. max_classes: limit of numeric labels without class names. numeric_labels: as in
    ``IndexRules``.
    """

    def __init__(
        self,
        location: str,
        classes: Sequence[str] | None,
        label_key: str | None,
        max_classes: int,
        numeric_labels: str | None = None,
    ) -> None:
        self._location, self._label_key, self._max_classes = location, label_key, max_classes
        self._numeric_labels = numeric_labels
        self._labels, self._label_of_value, self._values_are_distinct = _build_tables(tuple(classes or ()))

    def parse_cls(self, key: str, data: bytes) -> int:
        """Return the label from the first bytes of a `.cls` member. Raises: DataError."""
        encoding = next((name for mark, name in _TEXT_MARKS.items() if data.startswith(mark)), "utf-8")
        try:
            text = (
                data[:MAX_LABEL_BYTES].decode(encoding, "ignore" if len(data) > MAX_LABEL_BYTES else "strict").strip()
            )
        except UnicodeDecodeError:
            text = "\0"
        if not text:
            raise self._error(key, "is empty", "leave the .cls of a sample without a class out")
        if not text.isprintable():
            raise self._error(key, f"is no text (bytes {data[:8].hex(' ')})", _REWRITE)
        return self._parse_text(key, text)

    def parse_json(self, key: str, data: bytes) -> int:
        """Return the label from a `.json` member, -1 for none. Raises: DataError."""
        try:
            value = json.loads(data).get(self._label_key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{self._location}: the .json of '{key}' is no JSON object ({error})") from None
        return self._parse_value(key, value)

    def _parse_value(self, key: str, value: Any) -> int:
        if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is a gap in a table
            return -1
        if isinstance(value, list):
            raise self._error(
                key,
                f"is the list {json.dumps(value)[:40]}, not one number",
                "name another entry with --label-key, or index without it: task=multilabel reads lists",
            )
        if isinstance(value, dict):
            raise self._error(key, f"is the object {json.dumps(value)[:40]}", "name another entry with --label-key")
        text = value.strip() if isinstance(value, str) else json.dumps(value)
        if not text:
            raise self._error(key, "is an empty text", "write null where there is no class")
        if isinstance(value, bool) and not self._labels:
            raise self._error(key, f"is {text}, not a number", "say what it means with --classes false,true")
        if isinstance(value, float) and value.is_integer() and normalize_name(text) not in self._labels:
            text = str(int(value))
        return self._parse_text(key, text)

    def _parse_text(self, key: str, text: str) -> int:
        """Return the label from text: a class name if classes are given, or a number; -1 for the number -1."""
        match = NUMBER.fullmatch(text)
        label = self._labels.get(normalize_name(text))
        if label is not None and self._numeric_labels == POSITIONS and match is None:
            raise LabelMismatchError(
                f"{self._location}: the label of '{key}' is {text[:40]!r}, a name, and --numeric-labels says positions"
            )
        if label is not None and self._numeric_labels != POSITIONS:
            return label
        if match is None:
            is_fraction = re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", text)
            problem = f"is {text[:40]!r}, not a {'whole ' if is_fraction else ''}number"
            if self._labels:
                raise self._error(key, problem, "it is not one of --classes")
            raise self._error(key, problem, _REWRITE if is_fraction else "give the names with --classes")
        number, limit = int(match[1]), len(self._labels) or self._max_classes
        if self._numeric_labels == NAMES and self._values_are_distinct and number in self._label_of_value:
            return self._label_of_value[number]  # '1.0' or '01' for the name '1'
        if number == -1 and number not in self._label_of_value:
            return -1
        problem = f"{self._location}: the label of '{key}' is {text[:40]}, and"
        if self._numeric_labels == NAMES:
            raise LabelMismatchError(f"{problem} is not one of --classes")
        if not 0 <= number < limit:
            kind = DataError if self._numeric_labels is None else LabelMismatchError
            raise kind(f"{problem} labels are 0 to {limit - 1}")
        return number

    def _error(self, key: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self._location}: the label of '{key}' {problem}: {remedy}")


def normalize_name(name: str) -> str:
    """Return a name in the normal form NFC: file systems and editors write é as one character or as two."""
    return unicodedata.normalize("NFC", name)


def check_class_names(classes: Sequence[str]) -> None:
    """Raise DataError if a class name is empty or comes twice."""
    seen: dict[str, int] = {}
    for label, name in enumerate(classes):
        if not name:
            raise DataError(f"--classes: name {label} of {len(classes)} is empty (names are counted from 0)")
        first = seen.setdefault(normalize_name(name), label)
        if first != label:
            raise DataError(f"--classes: '{name}' is name {first} and name {label}: a class has one label")
