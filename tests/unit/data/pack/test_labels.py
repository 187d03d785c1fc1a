"""Labels of a column, by its type and its cells: numbers, names, lists, and what is refused or said."""

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from foveal.data.pack.label_cells import ColumnRules
from foveal.data.pack.labels import parse_labels
from foveal.errors import DataError

CSV = ColumnRules(is_csv=True)
TYPED = ColumnRules()
OF_THREE = ColumnRules(names=("a", "b", "c"))
LISTS = ColumnRules(lists="classes")
ONE_HOT = ColumnRules(lists="one-hot")


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1, 0], [1, 0], ("0", "1")),
        ([1.0, float("nan"), 0.0], [1, -1, 0], ("0", "1")),
        ([Decimal("1.0"), Decimal(0)], [1, 0], ("0", "1")),
        (["1", " 0 ", ""], [1, 0, -1], ("0", "1")),
        (["2.0", "10.0", "0.0", "1e0", "+3", "-1.0"], [2, 10, 0, 1, 3, -1], tuple(map(str, range(11)))),
        (["2", "nan", "0", "1", None], [2, -1, 0, 1, -1], ("0", "1", "2")),
        (["007", "001", "010"], [1, 0, 2], ("001", "007", "010")),
        (["01", "1", "10", "0"], [1, 1, 10, 0], tuple(map(str, range(11)))),
        (["1", "b"], [0, 1], ("1", "b")),
        (["e\u0301", "\u00e9", "a"], [1, 1, 0], ("a", "\u00e9")),
        ([True, False, None], [1, 0, -1], ("False", "True")),
        (["TRUE", "true"], [1, 1], ("False", "True")),
        ([None, "  "], [-1, -1], None),
        ([None, None], [-1, -1], None),
        ([-1, -1], [-1, -1], None),
    ],
)
@pytest.mark.parametrize("rules", [CSV, TYPED], ids=["csv", "typed"])
def test_what_a_cell_means(
    values: list[Any], labels: list[int], classes: tuple[str, ...] | None, rules: ColumnRules
) -> None:
    parsed = parse_labels(pa.array(values), "the test", rules)
    assert (parsed.labels.tolist(), parsed.classes, parsed.class_lists) == (labels, classes, None)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_integers_of_every_width_are_labels(bits: int) -> None:
    for kind in (getattr(pa, f"int{bits}")(), getattr(pa, f"uint{bits}")()):
        assert parse_labels(pa.array([2, 0, 1, None], kind), "the test").labels.tolist() == [2, 0, 1, -1]


def test_texts_for_missing_values_are_empty_as_by_pandas_unless_the_column_has_a_type() -> None:
    texts = pa.array(["cat", "NA", "dog", "None", "nan"])
    parsed = parse_labels(texts, "the test", CSV)
    assert (parsed.labels.tolist(), parsed.classes) == ([0, -1, 1, -1, -1], ("cat", "dog"))
    assert parsed.notes[0] == (
        "3 cells 'NA', 'None', 'nan' are read as empty, as by pandas; --label-separator '' keeps them as class names"
    )
    parsed = parse_labels(texts, "the test", ColumnRules(is_csv=True, separator=""))
    assert parsed.classes == ("NA", "None", "cat", "dog", "nan")
    parsed = parse_labels(pa.array(["1", "nan", "0"]), "the test", ColumnRules(is_csv=True, separator=""))
    assert (parsed.labels.tolist(), parsed.notes) == ([1, -1, 0], ("1 cells 'nan' are read as empty, as by pandas",))
    parsed = parse_labels(texts, "the test", TYPED)
    assert parsed.classes == ("NA", "None", "cat", "dog", "nan")
    assert parsed.notes == ("'NA', 'None', 'nan' in a column of texts is a class name",)


def test_categories_are_the_classes() -> None:
    def categorical(codes: list[int | None], categories: list[Any], *, ordered: bool) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(categories), ordered=ordered)

    for categories, ordered, labels, classes in (
        (["low", "mid", "high"], True, [0, 2, -1], ("low", "mid", "high")),
        (["low", "mid", "high"], False, [1, 0, -1], ("high", "low", "mid")),
        (["0", "1", "10"], False, [0, 10, -1], tuple(map(str, range(11)))),
        ([0, 1, 2], True, [0, 2, -1], ("0", "1", "2")),
    ):
        parsed = parse_labels(categorical([0, 2, None], categories, ordered=ordered), "the test")
        assert (parsed.labels.tolist(), parsed.classes) == (labels, classes)
    chunks = [categorical([0], ["b"], ordered=False), categorical([0], ["a"], ordered=False)]
    assert parse_labels(pa.chunked_array(chunks), "the test").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "rules", "class_lists", "classes"),
    [
        ([[2, 0], [1], []], LISTS, ((0, 2), (1,), ()), ("0", "1", "2")),
        ([[2.0, 0.0], [1.0]], LISTS, ((0, 2), (1,)), ("0", "1", "2")),
        ([["dog", "cat"], ["cat"]], LISTS, ((0, 1), (0,)), ("cat", "dog")),
        ([[2, 0], []], ColumnRules(names=("a", "b", "c"), lists="classes"), ((0, 2), ()), ("a", "b", "c")),
        (["[0, 2]", "[]", "[1]"], LISTS, ((0, 2), (), (1,)), ("0", "1", "2")),
        (["['dog', 'cat']", "['cat']"], LISTS, ((0, 1), (0,)), ("cat", "dog")),
        (["dog|cat", "cat", "|"], ColumnRules(separator="|"), ((0, 1), (0,), ()), ("cat", "dog")),
        (["2 0", "1"], ColumnRules(is_csv=True, separator=" "), ((0, 2), (1,)), ("0", "1", "2")),
        ([[True, False, True], [False, False, False]], ONE_HOT, ((0, 2), ()), ("0", "1", "2")),
        ([[1, 0, 1], [0, 0, 1]], ONE_HOT, ((0, 2), (2,)), ("0", "1", "2")),
        ([[1, 0, 1], [0, 0, 1]], ColumnRules(names=("a", "b", "c"), lists="one-hot"), ((0, 2), (2,)), ("a", "b", "c")),
    ],
)
def test_lists_are_several_classes(
    values: list[Any], rules: ColumnRules, class_lists: tuple[tuple[int, ...], ...], classes: tuple[str, ...]
) -> None:
    parsed = parse_labels(pa.array(values), "the test", rules)
    assert (parsed.class_lists, parsed.classes) == (class_lists, classes)
    assert "labels are lists, stored in .json members, which task=multilabel reads" in parsed.notes


def test_one_hot_lists_with_one_class_each_are_labels() -> None:
    parsed = parse_labels(pa.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), "the test", ONE_HOT)
    assert (parsed.labels.tolist(), parsed.class_lists) == ([1, 0], None)
    rules = ColumnRules(separator=" ", lists="one-hot")
    assert parse_labels(pa.array(["0 1 0", "1 0 0"]), "the test", rules).labels.tolist() == [1, 0]
    for kind in (pa.list_(pa.int64(), 2), pa.large_list(pa.int8())):
        parsed = parse_labels(pa.array([[0, 1], [1, 0]], kind), "the test", ONE_HOT)
        assert parsed.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "rules", "sentence"),
    [
        ([7, 70_000_000], TYPED, r"labels from 7 to 70000000, .* number the classes from 0"),
        (["7", "70000000000000000000"], CSV, r"labels from 7 to 70000000000000000000"),
        ([-2, 0], TYPED, r"labels from -2 to 0, .* or -1 for none"),
        ([0, 3], OF_THREE, r"labels from 0 to 3, and labels are 0 to 2"),
        ([1.5, 0.0], TYPED, r"holds real numbers, such as 1.5 \(double\), and labels are whole numbers"),
        ([Decimal("0.5")], TYPED, r"holds real numbers, such as 0.5 \(decimal"),
        (["0.5", "1.0"], CSV, r"holds real numbers, such as 0.5 \(text\)"),
        (["inf", "1"], CSV, r"holds real numbers, such as inf"),
        ([{"a": 1}], TYPED, r"is of type struct<a: int64>, such as {'a': 1}, and a label is a class number"),
        ([dt.datetime(2020, 1, 1)], TYPED, r"is of type timestamp"),  # noqa: DTZ001
        ([dt.date(2020, 1, 1)], TYPED, r"is of type date32"),
        ([b"cat"], TYPED, r"is of type binary, such as b'cat'"),
        (pa.array([b"0" * 16], pa.uuid()), TYPED, r"is of type extension<arrow.uuid>"),
        ([[{"a": 1}]], TYPED, r"is of type struct<a: int64>"),
        ([[[1]]], TYPED, r"is of type list<"),
        ([[0.5], [1.0]], TYPED, r"holds real numbers, such as 0.5"),
        ([[1], None], LISTS, r"1 of 2 rows have no list of classes: write an empty list"),
        ([[1, None]], TYPED, r"a list with an empty entry"),
        ([[1, -1]], LISTS, r"a list with an entry -1"),
        ([[0, 2], [1]], TYPED, r"holds lists \(list<.*int64>\), such as \[0, 2\]: .* say --label-lists classes$"),
        ([["a"], ["b", "c"]], TYPED, r"such as \['a'\]: if they are the classes of an image"),
        ([[1, 0, 1], [0, 1, 0]], TYPED, r"look one-hot, with a 0 or 1 for every class: then say --label-lists one-hot"),
        ([[True, False]], LISTS, r"holds lists of bool: .* say --label-lists one-hot"),
        ([[5, 5], [7]], LISTS, r"the list \[5, 5\] holds a class twice, .* every class of an image once$"),
        ([[1, 0, 1]], LISTS, r"the list \[1, 0, 1\] holds a class twice.* look one-hot"),
        ([[0, 2], [1, 0]], ONE_HOT, r"not one-hot: its lists hold 2 to 2 entries from 0 to 2"),
        ([[0, 1], [1]], ONE_HOT, r"not one-hot: its lists hold 1 to 2 entries"),
        ([["a"], ["b"]], ONE_HOT, r"has lists of string, .* say --label-lists classes"),
        ([0, 1], ONE_HOT, r"is of type int64 and holds no lists: omit --label-lists"),
        ([0, 1], ColumnRules(separator="|"), r"is of type int64, not text: omit --label-separator"),
        (["[0 2]", "[1]"], CSV, r"has cells such as '\[0 2\]', which seem to hold several values"),
        (["[0, 2]", "cat"], CSV, r"has cells such as '\[0, 2\]'"),
        (["{'a': 1}"], CSV, r"has cells such as \"{'a': 1}\""),
        (["0 2", "1"], CSV, r"cells such as '0 2': .* say --label-separator ' '; if they are class names, say .* ''"),
        (
            ["0,5", "1,0"],
            CSV,
            r"cells such as '0,5': if they are numbers with a decimal comma, write 0.5; if they hold",
        ),
        (["0,5", "1,0"], CSV, r"if they hold several classes, say --label-separator ','"),
        (["cat, zebra", "cat, dog", "dog", "cat"], CSV, r"cells such as 'cat, dog': .* --label-separator ','"),
        (["clear primary", "haze primary", "clear"], CSV, r"such as 'clear primary': .* --label-separator ' '"),
        (["haze primary", "primary", "clear"], CSV, r"such as 'haze primary': .* --label-separator ' '"),
        (["clear primary", "haze primary water", "agriculture clear water"], CSV, r"such as .* --label-separator ' '"),
        (["haze,primary", "primary", "clear"], CSV, r"such as 'haze,primary': .* --label-separator ','"),
        (["cat + dog", "cat", "cow"], CSV, r"such as 'cat \+ dog': .* --label-separator '\+'"),
        (["cat/dog", "cat"], CSV, r"such as 'cat/dog': .* --label-separator '/'"),
        (
            ["1,000", "999", "12,500"],
            CSV,
            r"such as '1,000': if they are numbers .* thousands, write 1000; if they hold",
        ),
        (["0 1 0", "1 0 0"], ColumnRules(separator=" "), r"holds a class twice.* then say --label-lists one-hot"),
        ([[0, 1], [1, 0]], LISTS, r"all of the same two classes; they look one-hot.* then say --label-lists one-hot"),
        ([[0.0, 1.0], [1.0, 0.0]], LISTS, r"all of the same two classes; they look one-hot"),
        (["0 1", "1 0"], ColumnRules(separator=" "), r"all of the same two classes; they look one-hot"),
        (["a|b", None], ColumnRules(separator="|"), r"1 of 2 rows have no list of classes: write '\|' if no class"),
        (["2020-01-01", "2020-01-02 10:00:00"], CSV, r"holds dates, such as '2020-01-01': choose another column, or"),
        (["a\n1.jpg,b"], CSV, r"a cell 'a\\n1.jpg,b', which holds a line break"),
        (["cat|dog", "dog|cow", "cat|cow"], CSV, r"cells such as 'cat\|cow': .* --label-separator '\|'"),
    ],
)
def test_columns_whose_meaning_is_not_certain_are_refused(values: list[Any], rules: ColumnRules, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"the test.*{sentence}"):
        parse_labels(pa.array(values), "the test", rules)


def test_joined_names_are_names_if_so_said() -> None:
    texts = pa.array(["cat|dog", "dog|cow", "cat|cow"])
    assert parse_labels(texts, "the test", ColumnRules(separator="")).classes == ("cat|cow", "cat|dog", "dog|cow")
    for names in (
        ["black cat", "black dog", "white cat", "white dog"],
        ["Fox Sparrow", "Mallard", "Song Sparrow"],
        ["mask", "no mask", "no tumor", "tumor"],
        ["AC/DC", "Blues"],
    ):
        assert parse_labels(pa.array(names), "the test").classes == tuple(names)
    names = ("great white shark, white shark", "hammerhead, hammerhead shark", "maillot", "maillot, tank suit")
    assert parse_labels(pa.array(names), "the test").classes == names


@pytest.mark.parametrize(
    ("values", "sentences"),
    [
        (["007", "101"], ["codes with leading zeros, such as '007', are class names"]),
        (["10", "2", "?"], ["numbers ('10', '2') beside texts ('?'): all are class names"]),
        ([[1, 2], [2]], ["task=multilabel", "label 0 has no samples: labels are 1 to 2, so a model has 3 classes"]),
        ([[0, 1], [0, 1]], ["every row has every class, from which nothing can be learnt", "task=multilabel"]),
        ([[0, 3]], ["task=multilabel", "2 of 4 classes have no samples: '1', '2'"]),
    ],
)
def test_what_is_said(values: list[Any], sentences: list[str]) -> None:
    rules = LISTS if isinstance(values[0], list) else TYPED
    notes = parse_labels(pa.array(values), "the test", rules).notes
    assert len(notes) == len(sentences)
    assert all(sentence in note for sentence, note in zip(sentences, notes, strict=True))
