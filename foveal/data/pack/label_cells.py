"""Cells of a label column that hold one class each: numbers, names, categories."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from foveal.data.format.class_counts import list_some
from foveal.data.indexing.tar import MAX_CLASSES
from foveal.errors import ConfigError, DataError

# Texts that pandas.read_csv reads as a missing value.
MISSING_TEXTS = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
MISSING_TEXTS |= {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
_BOOLEANS = ("False", "True")
_EXACT_INTEGERS = 2.0**53  # every whole float below is exact
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}([\s,]\d{3})+")  # 1,000
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_NEGATIONS = {"no", "non", "not", "without"}  # `no tumor` beside `tumor` is one class
_MARKS = "|;,/+& "  # between several classes of a cell; the space last, which may stand beside another mark
_SEVERAL_NUMBERS = re.compile(r"[+-]?\d+(\.\d*)?(\s*[ ,;|/]\s*[+-]?\d+(\.\d*)?)+")


@dataclass(frozen=True)
class ColumnRules:
    """Rules for the cells of a label column.

    names: class names by label, if the column's type has them. is_csv: whether texts have no type, so that pandas' texts
    for missing values are empty cells. separator: text between the classes in a cell; '': none, a cell is one name, also
    such a text; None: refuse cells that seem to hold several. lists: what lists hold, the classes of an image, or a 0 or
    1 for every class; None: refuse lists.
    Raises: ConfigError for another ``lists``.
    """

    names: tuple[str, ...] | None = None
    is_csv: bool = False
    separator: str | None = None
    lists: str | None = None

    def __post_init__(self) -> None:
        if self.lists not in (None, "classes", "one-hot"):
            raise ConfigError(f"label_lists={self.lists}: lists of labels hold classes, or are one-hot")


class CellParser:
    """Parser of one column, whose cells hold one class each; ``notes`` are what is to be said of them."""

    def __init__(self, location: str, rules: ColumnRules) -> None:
        self.location, self.rules = location, rules
        self.notes: list[str] = []

    def parse(self, array: pa.Array) -> tuple[np.ndarray, tuple[str, ...] | None]:
        """Return labels int64 [n] and class names of a column that has no lists."""
        kind = array.type
        if pa.types.is_dictionary(kind):
            return self._parse_categories(array)
        if pa.types.is_null(kind):
            return np.full(len(array), -1, dtype=np.int64), None
        if pa.types.is_boolean(kind):
            return np.array([-1 if value is None else value for value in array.to_pylist()], np.int64), _BOOLEANS
        if pa.types.is_integer(kind):
            return self._number_classes(array.to_pylist())
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return self._number_classes([self._to_whole(value, str(kind)) for value in array.to_pylist()])
        if is_text(kind):
            return self._parse_texts(strip(array.to_pylist()))
        example = next((value for value in array.to_pylist() if value is not None), None)
        raise DataError(
            f"{self.location} is of type {str(kind)[:120]}, such as {repr(example)[:60]}, and a label is a class number, a "
            f"class name or a list of these: choose another column, or convert this one"
        )

    def _parse_categories(self, array: pa.DictionaryArray) -> tuple[np.ndarray, tuple[str, ...] | None]:
        categories = array.dictionary.to_pylist()
        are_names = is_text(array.type.value_type) and not all(map(_is_number, filter(None, strip(categories))))
        if are_names or (array.type.ordered and is_text(array.type.value_type)):
            return self._name_classes(strip(array.to_pylist()), strip(categories), keep_order=array.type.ordered)
        return self.parse(array.dictionary_decode())

    def _parse_texts(self, texts: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...] | None]:
        counts = Counter(text for text in texts if text is not None)
        missing = sorted(MISSING_TEXTS & counts.keys())
        present = counts.keys() - MISSING_TEXTS
        are_numbers = bool(present) and all(_is_number(text) for text in present)
        if missing and (are_numbers or (self.rules.is_csv and self.rules.separator != "")):
            number = sum(counts[text] for text in missing)
            remedy = "" if are_numbers else "; --label-separator '' keeps them as class names"
            self.notes.append(f"{number:,} cells {list_some(missing)} are read as empty, as by pandas{remedy}")
            texts = [None if text in MISSING_TEXTS else text for text in texts]
        elif missing:
            self.notes.append(f"{list_some(missing)} in a column of texts is a class name")
            present = set(counts)
        if not present:
            return np.full(len(texts), -1, dtype=np.int64), None
        if are_numbers and not self._are_codes(present):
            return self._number_classes([None if text is None else self._read_whole(text) for text in texts])
        if {text.casefold() for text in present} <= {"false", "true"}:
            return np.array([-1 if text is None else text.casefold() == "true" for text in texts], np.int64), _BOOLEANS
        if broken := sorted(text for text in present if not text.isprintable()):
            raise DataError(
                f"{self.location} has a cell {broken[0][:60]!r}, which holds a line break or a control character: close "
                f"its quotes, or choose another column"
            )
        if self.rules.separator is None:
            self._refuse_doubtful(present)
        return self._name_classes(texts, sorted(present), keep_order=False)

    def _are_codes(self, texts: set[str]) -> bool:
        """Whether numbers are names, such as '007': digits of one length, some of which begin with 0."""
        are_codes = len(set(map(len, texts))) == 1 and all(text.isdecimal() for text in texts)
        are_codes = are_codes and len(min(texts)) > 1 and any(text.startswith("0") for text in texts)
        if are_codes:
            self.notes.append(f"codes with leading zeros, such as '{min(texts)}', are class names")
        return are_codes

    def _refuse_doubtful(self, names: set[str]) -> None:
        """Refuse texts that seem to be dates, or several classes such as 'cat|dog'."""
        if all(_DATE.fullmatch(name) for name in names):
            raise DataError(
                f"{self.location} holds dates, such as '{min(names)}': choose another column, or, if every date is a "
                f"class, say --label-separator ''"
            )
        numbers = sorted(name for name in names if _SEVERAL_NUMBERS.fullmatch(name))
        if numbers:
            separator = next(mark for mark in _MARKS if mark in numbers[0])
            self._ask_for_separator(numbers[0], separator, _describe_as_numbers(numbers))
        for mark in _MARKS:
            if joined := sorted(name for name in names if mark in name) if _are_joined(names, mark) else []:
                self._ask_for_separator(joined[0], mark, "")

    def _ask_for_separator(self, example: str, separator: str, other_meaning: str) -> NoReturn:
        raise DataError(
            f"{self.location} has cells such as '{example[:60]}': {other_meaning}if they hold several classes, say "
            f"--label-separator '{separator}'; if they are class names, say --label-separator ''"
        )

    def _name_classes(
        self, texts: Sequence[str | None], categories: Sequence[str | None], *, keep_order: bool
    ) -> tuple[np.ndarray, tuple[str, ...] | None]:
        normal_texts = [None if text is None else unicodedata.normalize("NFC", text) for text in texts]
        names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in categories if name))
        names = names if keep_order else sorted(names)
        numbers = [name for name in names if _is_number(name)]
        if numbers and len(numbers) < len(names):
            others = [name for name in names if not _is_number(name)]
            self.notes.append(
                f"numbers ({list_some(numbers)}) beside texts ({list_some(others)}): all are class names, "
                f"and a label is the position among the sorted names"
            )
        label_of = {name: label for label, name in enumerate(names)}
        return np.array([-1 if text is None else label_of[text] for text in normal_texts], np.int64), tuple(names)

    def _number_classes(self, numbers: Sequence[int | None]) -> tuple[np.ndarray, tuple[str, ...] | None]:
        labels = [-1 if number is None else number for number in numbers]
        lowest, highest = min(labels, default=-1), max(labels, default=-1)
        names = self.rules.names
        limit = MAX_CLASSES if names is None else len(names)
        if lowest < -1 or highest >= limit:
            raise DataError(
                f"{self.location}: labels from {lowest} to {highest}, and labels are 0 to {limit - 1}, or -1 for none: "
                f"number the classes from 0, or give their names"
            )
        return np.array(labels, dtype=np.int64), names or tuple(str(label) for label in range(highest + 1)) or None

    def _read_whole(self, text: str) -> int | None:
        return int(text) if re.fullmatch(r"[+-]?\d{1,40}", text) else self._to_whole(float(text), "text")

    def _to_whole(self, value: Any, kind: str) -> int | None:
        """Return a whole number, or None for NaN; ``kind`` is the column's type."""
        if value is None or value != value:  # noqa: PLR0124 - NaN, which some libraries write for a missing value
            return None
        if abs(value) >= _EXACT_INTEGERS or value != int(value):
            raise DataError(
                f"{self.location} holds real numbers, such as {value} ({kind}), and labels are whole numbers or class "
                f"names: choose another column, or divide the range of this one into classes"
            )
        return int(value)


def is_text(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is one of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def strip(texts: Sequence[str | None]) -> list[str | None]:
    """Return texts without spaces around them; None for an empty text."""
    return [None if text is None else text.strip() or None for text in texts]


def _is_number(text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    return number == number and "_" not in text  # noqa: PLR0124 - neither NaN, nor 1_000, a number in Python only


def _describe_as_numbers(texts: Sequence[str]) -> str:
    """Return what to do if texts such as '1,000' or '0,5' are numbers after all; '' for others."""
    if all(_THOUSANDS.fullmatch(text) for text in texts):
        return f"if they are numbers with a separator of thousands, write {int(re.sub(r'[^0-9+-]', '', texts[0]))}; "
    if all(_DECIMAL_COMMA.fullmatch(text) for text in texts):
        return f"if they are numbers with a decimal comma, write {texts[0].replace(',', '.')}; "
    return ""


def _are_joined(names: set[str], mark: str) -> bool:
    """Whether names seem to be several classes with a mark between: always for a bar or a semicolon.

    A part that is also a name by itself, in half of the names with the mark, speaks for it: 'haze primary' and 'primary'.
    So do parts of which most occur in several names, with a comma, or if one is a name or stands in several places.
    Names of species share few parts: 'crane' and 'great white shark, white shark' are names.
    """
    parts_of = {name: [part.strip() for part in name.split(mark) if part.strip()] for name in names if mark in name}
    parts_of = {name: parts for name, parts in parts_of.items() if _NEGATIONS.isdisjoint(map(str.casefold, parts))}
    if mark in "|;" or not parts_of:
        return bool(parts_of)
    num_with_names = sum(not names.isdisjoint(parts) for parts in parts_of.values())
    counts = Counter(part for name in names for part in set(parts_of.get(name, [name])))
    parts = set().union(*parts_of.values())
    most_shared = sum(counts[part] > 1 for part in parts) * 2 > len(parts)
    first, later = (
        {part for parts in parts_of.values() for part in parts[chosen]} for chosen in (slice(1), slice(1, None))
    )
    return num_with_names * 2 >= len(parts_of) or (
        most_shared and (mark == "," or num_with_names > 0 or not first.isdisjoint(later))
    )
