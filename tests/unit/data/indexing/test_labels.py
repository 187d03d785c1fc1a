"""Labels in `.cls` and `.json` members as others write them: read right, or refused with the remedy."""

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.format.manifest import read_manifest
from foveal.data.format.shard_index import mmap_index
from foveal.data.indexing.index import index_folder
from foveal.data.indexing.labels import LabelParser
from foveal.errors import DataError, FovealError

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def parser(classes: tuple[str, ...] | None = None) -> LabelParser:
    return LabelParser("s.tar", classes, "label", 1000)


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"3", 3),
        (b" 3\r\n", 3),
        (b"3.0", 3),
        (b"3.", 3),
        (b"003", 3),
        (b"+3", 3),
        (b"-0.0", 0),
        (b"-1", -1),
        (b"-1.0", -1),
        (codecs.BOM_UTF8 + b"3\n", 3),
        ("3\n".encode("utf-16"), 3),
    ],
)
def test_numbers_of_cls_members(data: bytes, label: int) -> None:
    assert parser().parse_cls("a", data) == label


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"the label of 'a' is empty: leave the .cls of a sample without a class out"),
        (b"\n", r"is empty: leave the .cls"),
        (b"\x03", r"is no text \(bytes 03\): write the shard again with the label as digits"),
        (b"\x03\0\0\0\0\0\0\0", r"is no text \(bytes 03 00 00 00 00 00 00 00\): write the shard again"),
        (b"\0", r"is no text \(bytes 00\)"),
        (b"\x93NUMPY\x01", r"is no text \(bytes 93 4e"),
        (b"caf\xe9", r"is no text \(bytes 63 61 66 e9\)"),
        (b"3.5", r"is '3.5', not a whole number: write the shard again with the label as digits"),
        (b"1_0", r"is '1_0', not a number: give the names with --classes"),
        (b"cat", r"is 'cat', not a number: give the names with --classes"),
        (b"[0, 1]", r"is '\[0, 1\]', not a number"),
        (b"-2", r"is -2, and labels are 0 to 999"),
        (b"9" * 100, r"is '9{40}', not a number"),
        (b"1e3", r"is '1e3', not a number"),
        (b"x" * 5000, r"is 'x{40}', not a number"),
        ("é".encode() * 300, r"not a number: give the names"),
    ],
)
def test_cls_members_that_give_no_label(data: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        parser().parse_cls("a", data)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (0.0, 0),
        (3.0, 3),
        ("3", 3),
        (" 3 ", 3),
        ("3.0", 3),
        (None, -1),
        (-1, -1),
        (-1.0, -1),
        ("-1", -1),
        (float("nan"), -1),
    ],
)
def test_numbers_of_json_members(value: Any, label: int) -> None:
    assert parser().parse_json("a", json.dumps({"label": value}).encode()) == label
    assert parser().parse_json("a", json.dumps({"label": value}).encode("utf-8-sig")) == label
    assert parser(tuple("abcd")).parse_json("a", json.dumps({"label": value}).encode()) == label


@pytest.mark.parametrize(
    ("value", "classes", "sentence"),
    [
        (1.5, None, r"is '1.5', not a whole number: write the shard again"),
        (float("inf"), None, r"is 'Infinity', not a number"),
        (True, None, r"is true, not a number: say what it means with --classes false,true"),
        (True, ("cat", "dog"), r"is 'true', not a number: it is not one of --classes"),
        ([3], None, r"is the list \[3\], not one number: name another entry with --label-key, or .* task=multilabel"),
        ({"id": 3}, None, r"is the object \{\"id\": 3\}: name another entry with --label-key"),
        ("", None, r"is an empty text: write null where there is no class"),
        ("cat", None, r"is 'cat', not a number: give the names with --classes"),
        (1e20, None, r"is 100000000000000000000, and labels are 0 to 999"),
        (-2, None, r"is -2, and labels are 0 to 999"),
        ("9" * 5000, None, r"is '9{40}', not a number"),
    ],
)
def test_json_members_that_give_no_label(value: Any, classes: tuple[str, ...] | None, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        parser(classes).parse_json("a", json.dumps({"label": value}).encode())


def test_a_remedy_is_no_further_refusal() -> None:
    assert parser(("false", "true")).parse_json("a", b'{"label": true}') == 1
    assert parser().parse_json("a", b"{}") == -1, "a missing key is no label, like null"


@pytest.mark.parametrize(("name", "text"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), (COMPOSED, COMPOSED)])
def test_class_names_match_in_either_unicode_form(name: str, text: str) -> None:
    assert parser(("tea", name)).parse_cls("a", text.encode()) == 1
    assert parser(("tea", name)).parse_json("a", json.dumps({"label": text}).encode()) == 1


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (["cat", "dog", "cat"], "--classes: 'cat' is name 0 and name 2: a class has one label"),
        ([COMPOSED, DECOMPOSED], "is name 0 and name 1"),
        (["cat", "", "dog"], "--classes: name 1 of 3 is empty"),
    ],
)
def test_class_names_that_are_not_distinct_are_refused(tmp_path: Path, classes: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        index_folder(str(tmp_path), classes=classes)


@pytest.mark.parametrize(
    ("labels", "classes", "sentence"),
    [
        ((1, 2), None, "label 0 has no samples: labels are 1 to 2"),
        ((0, 2), None, "1 of 3 classes has no samples: '1'"),
        ((0,), ("cat", "dog"), "1 of 2 classes has no samples: 'dog'"),
        ((0, 1), None, None),
        ((), None, None),
    ],
)
def test_classes_without_samples_are_said(
    tmp_path: Path,
    write_tar: Callable[..., Path],
    labels: tuple[int, ...],
    classes: tuple[str, ...] | None,
    sentence: str | None,
) -> None:
    for shard, label in enumerate((*labels, None)):
        members = [] if label is None else [("a.cls", b"%d" % label)]
        write_tar(tmp_path / f"train-{shard}.tar", [("a.jpg", b"x"), *members])
    warnings: list[str] = []
    index_folder(str(tmp_path), classes=classes, on_warning=warnings.append)
    assert [line for line in warnings if "no samples" in line and line.startswith(sentence or "-")] == warnings[1:]
    assert len(warnings) == 1 + (sentence is not None)


def run_index(folder: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "index", str(folder), *options])
    return result.exit_code, str(result.exception) if isinstance(result.exception, FovealError) else result.output


def test_names_with_commas_are_read_from_a_file(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.cls", b"goldfish, Carassius auratus")])
    names = tmp_path / "names.txt"
    for text in (
        "tench, Tinca tinca\ngoldfish, Carassius auratus",
        "\ufefftench, Tinca tinca\r\ngoldfish, Carassius auratus\r\n\n",
    ):
        names.write_text(text, newline="")
        code, output = run_index(tmp_path, "--classes-file", str(names), "--again")
        assert code == 0
        assert "2 classes" in output
        assert mmap_index(tmp_path / "train-0.tar.index")[0].labels.tolist() == [1]
    assert read_manifest(tmp_path).classes == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    code, output = run_index(tmp_path, "--classes", "tench, Tinca tinca,goldfish, Carassius auratus", "--again")
    assert code
    assert "commas with and without a space behind: names that contain commas are given with --classes-file" in output
    _, output = run_index(tmp_path, "--classes", "tench, Tinca tinca, goldfish, Carassius auratus", "--again")
    assert "3 of 4 classes have no samples" in output
    assert "names that contain commas are given with --classes-file" in output


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("cat\n\ndog\n", (), r"name 1 of 3 is empty"),
        ("cat\ncat\n", (), r"'cat' is name 0 and name 1"),
        ("\n", (), r"names.txt has no names"),
        ("cat\n", ("--classes", "cat"), r"--classes and --classes-file both give the class names: omit one"),
        (None, (), r"names.txt cannot be read as UTF-8"),
    ],
)
def test_a_file_of_names_that_cannot_be_used_is_a_sentence(
    tmp_path: Path, text: str | None, options: tuple[str, ...], sentence: str
) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    _, output = run_index(tmp_path, "--classes-file", str(tmp_path / "names.txt"), *options)
    assert re.search(sentence, output)
