"""Labels of a column: one class per row, or lists of classes, by the column's type and its cells."""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa
from pyarrow import compute

from foveal.data.format.class_counts import describe_empty_classes
from foveal.data.pack.label_cells import MISSING_TEXTS, CellParser, ColumnRules, is_text, strip
from foveal.data.pack.source import PackDataset, PackSplit, SampleLabel
from foveal.errors import DataError

_LIST_TEXT = re.compile(r"\[(\s*|.*[\d'\"]\s*,?\s*|.*(True|False|None)\s*)\]|\(.*,.*\)", re.DOTALL)

ClassLists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ColumnLabels:
    """Labels of n rows, and what is to be said of them.

    labels: int64 [n], -1: no label. class_lists: the classes of every row, if rows have several; labels are -1 then.
    """

    labels: np.ndarray
    classes: tuple[str, ...] | None = None
    class_lists: ClassLists | None = None
    notes: tuple[str, ...] = ()

    def __getitem__(self, row: int) -> SampleLabel:
        return int(self.labels[row]) if self.class_lists is None else self.class_lists[row]

    def make_dataset(self, name: str, splits: dict[str, PackSplit], notes: Sequence[str] = ()) -> PackDataset:
        """Return the data set of rows with these labels; ``notes`` come first."""
        lists = None if self.class_lists is None else hashlib.sha256(json.dumps(self.class_lists).encode()).hexdigest()
        return PackDataset(
            name,
            self.classes,
            splits,
            notes=(*notes, *self.notes),
            listing=lists,
            multilabel=self.class_lists is not None,
        )


def parse_labels(column: pa.ChunkedArray | pa.Array, location: str, rules: ColumnRules | None = None) -> ColumnLabels:
    """Return the labels of a column.

    Whole numbers, also those stored as floats or texts, are the labels; -1, NaN and an empty cell mean no label. Texts
    are class names, and the label is the position among the sorted names; ordered categories keep their order. Lists of
    numbers or names are several classes per row.
    Raises: DataError for other types, real numbers, labels out of range, and cells whose meaning is not certain; the
    message begins with ``location``.
    """
    parser = CellParser(location, rules or ColumnRules())
    list_parser = _ListParser(parser)
    whole = column.unify_dictionaries().combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = list_parser.read_texts(whole)
    class_lists: ClassLists | None = None
    if _is_list(array.type):
        class_lists, classes = list_parser.parse(array)
        if parser.rules.lists == "one-hot" and all(len(row) == 1 for row in class_lists):
            labels, class_lists = np.array([row[0] for row in class_lists], dtype=np.int64), None
        else:
            labels = np.full(len(array), -1, dtype=np.int64)
            parser.notes.append("labels are lists, stored in .json members, which task=multilabel reads")
    else:
        if parser.rules.lists:
            raise DataError(f"{location} is of type {array.type} and holds no lists: omit --label-lists")
        labels, classes = parser.parse(array)
        parser.notes += [] if classes else ["no row has a label"]
    if class_lists is not None and classes:
        numbers = np.array([number for row in class_lists for number in row], dtype=np.int64)
        sentence = describe_empty_classes(np.bincount(numbers, minlength=len(classes)), classes)
        parser.notes += [sentence] if sentence else []
    return ColumnLabels(labels, classes, class_lists, tuple(parser.notes))


class _ListParser:
    """Parser of a column whose cells are lists, or texts that hold lists."""

    def __init__(self, cells: CellParser) -> None:
        self._cells, self._location, self._rules = cells, cells.location, cells.rules

    def parse(self, array: pa.Array) -> tuple[ClassLists, tuple[str, ...] | None]:
        """Return the classes of every row and the class names of a column of lists."""
        if array.null_count:
            empty = f"'{self._rules.separator}'" if self._rules.separator else "an empty list"
            raise DataError(
                f"{self._location}: {array.null_count:,} of {len(array):,} rows have no list of classes: write {empty} if no "
                f"class applies, or leave these rows out"
            )
        flat, lengths = array.flatten(), _list_lengths(array)
        if flat.null_count:
            raise DataError(f"{self._location} has a list with an empty entry: remove it")
        if pa.types.is_boolean(flat.type) and self._rules.lists != "one-hot":
            raise DataError(
                f"{self._location} holds lists of bool: if one stands for each class, say --label-lists one-hot"
            )
        if self._rules.lists is None and not self._rules.separator:
            self._ask(array, flat)
        if self._rules.lists == "one-hot":
            return self._parse_one_hot(flat, lengths)
        numbers, classes = self._cells.parse(flat)
        if (numbers < 0).any():
            raise DataError(f"{self._location} has a list with an entry -1 or without a text: remove it")
        rows = tuple(tuple(sorted(map(int, row))) for row in np.split(numbers, np.cumsum(lengths)[:-1]))
        repeated = next((number for number, row in enumerate(rows) if len(set(row)) < len(row)), None)
        if repeated is not None:
            raise DataError(
                f"{self._location}: the list {str(array[repeated].as_py())[:60]} holds a class twice, and lists are to hold "
                f"every class of an image once{self._hint_one_hot(array, flat)}"
            )
        if all(len(row) == len(classes or ()) > 1 for row in rows):
            self._check_full_lists(array, flat)
        return rows, classes

    def _check_full_lists(self, array: pa.Array, flat: pa.Array) -> None:
        """Refuse one-hot lists of two classes, [0, 1] and [1, 0]; say of others that no row lacks a class."""
        hint = self._hint_one_hot(array, flat)
        if hint and len(set(map(tuple, array.to_pylist()))) > 1:
            raise DataError(
                f"{self._location} holds lists such as {array[0].as_py()}, all of the same two classes{hint}"
            )
        self._cells.notes.append("every row has every class, from which nothing can be learnt")

    def _ask(self, array: pa.Array, flat: pa.Array) -> NoReturn:
        """Refuse lists whose meaning was not said, naming what they seem to be."""
        CellParser(self._location, self._rules).parse(flat)  # refuses lists that cannot be labels
        raise DataError(
            f"{self._location} holds lists ({array.type}), such as {str(array[0].as_py())[:60]}: if they are the classes of an "
            f"image, which task=multilabel reads, say --label-lists classes{self._hint_one_hot(array, flat)}"
        )

    def _hint_one_hot(self, array: pa.Array, flat: pa.Array) -> str:
        lengths = set(_list_lengths(array).tolist())
        looks_one_hot = len(lengths) == 1 and min(lengths) > 1 and set(flat.to_pylist()) <= {0, 1, "0", "1"}
        return (
            "; they look one-hot, with a 0 or 1 for every class: then say --label-lists one-hot"
            if looks_one_hot
            else ""
        )

    def _parse_one_hot(self, flat: pa.Array, lengths: np.ndarray) -> tuple[ClassLists, tuple[str, ...] | None]:
        if is_text(flat.type) and set(flat.to_pylist()) <= {"0", "1"}:  # texts with a separator between
            flat = flat.cast(pa.int64())
        if not (pa.types.is_boolean(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)):
            raise DataError(
                f"{self._location} has lists of {flat.type}, and one-hot lists hold 0 and 1: say --label-lists classes"
            )
        table = np.array(flat.to_pylist(), dtype=np.float64)
        if len(set(lengths.tolist())) != 1 or not np.isin(table, (0, 1)).all():
            raise DataError(
                f"{self._location} is not one-hot: its lists hold {lengths.min()} to {lengths.max()} entries from "
                f"{table.min(initial=0):g} to {table.max(initial=0):g}, and one-hot lists hold a 0 or 1 for every class"
            )
        names = self._rules.names
        if names is None or len(names) != lengths[0]:
            names = tuple(str(number) for number in range(lengths[0]))
        return tuple(tuple(map(int, np.flatnonzero(row))) for row in table.reshape(len(lengths), -1)), names

    def read_texts(self, array: pa.Array) -> pa.Array:
        """Return an array of lists if the cells are texts that hold lists, such as '[0, 2]', or have a separator."""
        if not is_text(array.type):
            if self._rules.separator:
                raise DataError(f"{self._location} is of type {array.type}, not text: omit --label-separator")
            return array
        texts = strip(array.to_pylist())
        if separator := self._rules.separator:
            missing = MISSING_TEXTS if self._rules.is_csv else ()
            return pa.array(
                [
                    None if text is None or text in missing else [part for part in strip(text.split(separator)) if part]
                    for text in texts
                ],
                pa.list_(pa.string()),
            )
        examples = [text for text in set(texts) if text and (_LIST_TEXT.fullmatch(text) or text[0] + text[-1] == "{}")]
        if not examples or self._rules.separator == "":
            return array
        try:
            values = [None if text is None else ast.literal_eval(text) for text in texts]
            if not all(value is None or isinstance(value, list | tuple) for value in values):
                raise ValueError
            return pa.array(values)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError, pa.ArrowException):
            raise DataError(
                f"{self._location} has cells such as {min(examples)[:60]!r}, which seem to hold several values and are no class "
                f"names: write lists as [0, 2] or ['cat', 'dog'] in every row, or choose another column; if they are "
                f"class names, say --label-separator ''"
            ) from None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _list_lengths(array: pa.Array) -> np.ndarray:
    return np.asarray(compute.call_function("list_value_length", [array]))
