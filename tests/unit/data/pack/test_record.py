"""pack.json: a packed folder is left alone for the same source and options, and refused for others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.data.pack import pack_digits, pack_folder, pack_table
from foveal.data.pack import writer as packing
from foveal.data.pack.cli import app
from foveal.data.pack.record import RECORD_NAME
from foveal.errors import DataError

Put = Callable[..., Path]

NAMES = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]


@pytest.fixture
def source(put: Put) -> Path:
    return put("in", *NAMES)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    assert pack_folder(source, tmp_path / "out", resize=2)
    return tmp_path / "out"


def test_the_same_pack_is_left_alone_wherever_it_lies(source: Path, out: Path, tmp_path: Path) -> None:
    assert not pack_folder(source, out, resize=2, workers=1, val_fraction=0.1)
    moved = source.rename(tmp_path / "elsewhere")
    assert not pack_folder(moved, out.rename(tmp_path / "shards"), resize=2)
    assert str(tmp_path) not in (tmp_path / "shards" / RECORD_NAME).read_text()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({}, r"--resize: 2, now not set"),
        ({"resize": 3, "skip_bad": True}, r"--resize: 2, now 3; --skip-bad: off, now on"),
        ({"resize": 2, "splits": "none"}, r"--splits: not set, now none"),
        ({"resize": 2, "val_fraction": 0.0}, r"--val-fraction: 0.1, now 0.0"),
        ({"resize": 2, "name": "mine"}, r"--name: not set, now mine"),
    ],
)
def test_other_options_are_refused(source: Path, out: Path, options: dict[str, Any], difference: str) -> None:
    with pytest.raises(DataError, match=rf"out was packed with other options \({difference}\): choose another folder"):
        pack_folder(source, out, **options)


def test_another_source_is_refused(source: Path, out: Path, put: Put) -> None:
    """The other folder has the same names, sizes and classes; its pixels differ."""
    with pytest.raises(DataError, match=r"was packed from folder 'in', and \S+other differs from it: choose another"):
        pack_folder(put("other", *NAMES), out, resize=2)
    put("in", "cat/new.png")
    with pytest.raises(DataError, match=r"and \S+in has changed since, or is another of this name"):
        pack_folder(source, out, resize=2)
    with pytest.raises(DataError, match=r"was packed from folder 'in', not from digits"):
        pack_digits(out)


def test_a_source_that_is_gone_is_known_by_its_name(source: Path, out: Path, tmp_path: Path) -> None:
    shutil.rmtree(source)
    assert not pack_folder(source, out, resize=2)
    with pytest.raises(DataError, match=r"gone: no such folder of images"):
        pack_folder(tmp_path / "gone", out, resize=2)
    result = CliRunner().invoke(app, ["folder", str(source), "--out", str(out), "--resize", "2"])
    assert (
        result.exit_code == 0 and "in is not there: whether the shards were made from it is not known" in result.output
    )


def test_columns_and_rows_of_a_table_are_compared(put: Put, tmp_path: Path) -> None:
    put("in", *NAMES)
    table = tmp_path / "in" / "list.csv"
    rows = [f"{name},{name[:3]},{number % 2}" for number, name in enumerate(NAMES)]
    table.write_text("\n".join(["image,kind,odd", *rows]))
    pack_table(table, tmp_path / "out", label_column="kind")
    assert not pack_table(table, tmp_path / "out", label_column="kind")
    with pytest.raises(DataError, match=r"other options \(--label-column: kind, now odd\)"):
        pack_table(table, tmp_path / "out", label_column="odd")
    table.write_text("\n".join(["image,kind,odd", *rows[:-1], "cat/0.png,cat,1"]))
    with pytest.raises(DataError, match=r"was packed from table 'list.csv', and \S+list.csv has changed since"):
        pack_table(table, tmp_path / "out", label_column="kind")


def test_a_folder_of_an_earlier_version_is_left_alone(source: Path, out: Path) -> None:
    (out / RECORD_NAME).unlink()
    assert not pack_folder(source, out, resize=5)
    output = CliRunner().invoke(app, ["folder", str(source), "--out", str(out)]).output
    assert "already there, nothing to do; it holds 6 samples of 'in': train 6; 2 classes: cat, dog" in output
    assert f"it has no {RECORD_NAME}: what it was made from, and with which options, is not known" in output


def test_options_that_a_later_version_adds_have_their_default(source: Path, out: Path) -> None:
    record = json.loads((out / RECORD_NAME).read_text())
    del record["options"]["skip_bad"]
    (out / RECORD_NAME).write_text(json.dumps(record))
    assert not pack_folder(source, out, resize=2)
    with pytest.raises(DataError, match=r"--skip-bad: off, now on"):
        pack_folder(source, out, resize=2, skip_bad=True)


def test_a_damaged_record_is_a_sentence(source: Path, out: Path) -> None:
    (out / RECORD_NAME).write_text("{")
    with pytest.raises(DataError, match=rf"{RECORD_NAME} cannot be read \(.*\): remove it"):
        pack_folder(source, out, resize=2)


def test_the_slower_of_two_packs_with_other_options_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record = packing.write_record

    def pack_meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(packing, "write_record", write_record)
        pack_folder(source, tmp_path / "out", resize=2)
        write_record(*arguments)

    monkeypatch.setattr(packing, "write_record", pack_meanwhile)
    with pytest.raises(DataError, match=r"packed with other options \(--resize: 2, now 1\)"):
        pack_folder(source, tmp_path / "out", resize=1)


def test_the_command_says_what_was_understood(put: Put, tmp_path: Path) -> None:
    source = put("in", *(f"{split}/{name}" for split in ("train", "validation") for name in NAMES), "train/.x.png")
    output = CliRunner().invoke(app, ["folder", str(source), "--out", str(tmp_path / "out")]).output
    assert output.splitlines() == [
        f"{tmp_path / 'out'}: written, 12 samples of 'in': train 6, val 6; 2 classes: cat, dog",
        "  source: 12 images (.png 12) in 4 folders, 0.0 MB",
        "  labels: 2 classes, one per folder",
        "  splits: train, val is 'validation', by the names of the folders",
        "  passed over: hidden files: 1 (.x.png)",
        "  sizes: 2 x 2 pixels (6 training images)",
    ]


def test_folders_that_were_packed_as_classes_are_not_asked_about_again(put: Put, tmp_path: Path) -> None:
    """Versions before 0.2 took folders as classes although images lie beside them, or deeper."""
    source = put("in", *NAMES, "beside.png", "cat/deeper/0.png")
    assert pack_folder(source, tmp_path / "out", labels="folders")
    assert not pack_folder(source, tmp_path / "out")
    put("in", "dog/9.png")
    with pytest.raises(DataError, match="has changed since"):
        pack_folder(source, tmp_path / "out")
