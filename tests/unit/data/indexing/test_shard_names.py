"""Splits and numbers from the names of shards, as data sets are published."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.indexing.shard_names import group_shards_by_split
from foveal.data.storage.folder import LocalFolder, open_folder_or_url
from foveal.errors import DataError


def group(folder: Path, names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the splits of empty files with these names (without .tar), and the warnings."""
    for name in names:
        (folder / f"{name}.tar").touch()
    warnings: list[str] = []
    groups = group_shards_by_split(LocalFolder(str(folder)), warnings.append)
    return {split: [file.removesuffix(".tar") for file in files] for split, files in groups.items()}, warnings


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train-00000-of-00002", "train-00001-of-00002"], "train"),
        (["train-00001-of-00002", "train-00002-of-00002"], "train"),
        (["train_00000_of_00002", "train_00001_of_00002"], "train"),
        (["train-00000-of-00002-12345678", "train-00001-of-00002-ABCDEF01"], "train"),
        (["train-9-of-11", "train-10-of-11"], "train"),
        (["00000-of-00002", "00001-of-00002"], "train"),
        (["train-00000-of-00002-abc123def", "train-00001-of-00002-0123456789abcdef"], "train"),
        (["train-000000-abc123def", "train-000001-0fed321ba"], "train"),
        (["train_000", "train_001"], "train"),
        (["train.0001", "train.0002"], "train"),
        (["00000", "00001"], "train"),
        (["train-9", "train-10", "train-100"], "train"),
        (["train-000999", "train-1000000"], "train"),
        (["imagenet-train-000000", "imagenet-train-000001"], "imagenet-train"),
        (["imagenet2012-train-000000", "imagenet2012-train-000001"], "imagenet2012-train"),
        (["my.set-train-00000-of-00002", "my.set-train-00001-of-00002"], "my.set-train"),
        (["train-2017-000001", "train-2017-000002"], "train-2017"),
        (["validation-00000-of-00001"], "validation"),
        (["proof"], "proof"),
    ],
)
def test_names_are_a_split_and_a_number(tmp_path: Path, names: list[str], split: str) -> None:
    groups, warnings = group(tmp_path, names)
    assert groups == {split: names}
    assert not [
        warning for warning in warnings if "no split is named 'train'" not in warning and "missing" not in warning
    ]
    assert any("missing" in warning for warning in warnings) == (names[0] == "train-9-of-11")
    assert any(f"set data.train and data.val to splits of '{split}'" in line for line in warnings) == (split != "train")


def test_missing_shards_of_a_stated_total_are_said(tmp_path: Path) -> None:
    _, warnings = group(tmp_path, ["train-00000-of-00004", "train-00003-of-00004", "val-00000-of-00001"])
    assert warnings == ["train: 2 of 4 shards are missing, by their names: number 1, 2"]
    (tmp_path / "train-00001-of-00004.tar").touch()
    assert group(tmp_path, [])[1] == ["train: 1 of 4 shards is missing, by their names: number 2"]
    (tmp_path / "val-00000-of-00001.tar").unlink()
    _, warnings = group(tmp_path, ["val-00001-of-01024"])
    assert warnings[1] == "val: 1,023 of 1,024 shards are missing, by their names: number 0, 2, 3, 4, 5, ..."


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["train-00000-of-00002", "train-00000-of-00003"],
            r"split 'train' state different totals \(train-00000-of-00002",
        ),
        (["train-0-of-2-abc123def", "train-0-of-2-def123abc"], r"train-0-of-2-def123abc.tar are both shard 0 of split"),
        (
            ["train-00004-of-00004", "train-00005-of-00004"],
            r"train-00005-of-00004.tar is none of 4 shards: correct its na",
        ),
        (
            ["train-00000-of-00001", "train-00001-of-00001"],
            r"train-00001-of-00001.tar is none of 1 shards: correct its na",
        ),
    ],
)
def test_two_writings_of_one_split_are_refused(tmp_path: Path, names: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        group(tmp_path, names)


def test_several_ways_of_naming_in_one_split_are_said(tmp_path: Path) -> None:
    groups, warnings = group(tmp_path, ["00000", "train-000001", "train_000002"])
    assert groups == {"train": ["00000", "train-000001", "train_000002"]}
    assert warnings == [
        "train: its shards are named in 3 ways (00000.tar, train-000001.tar, train_000002.tar) and are one split"
    ]


@pytest.mark.parametrize("names", [["train-1", "train-000001"], ["train-000001", "train-00001-of-00002"]])
def test_two_names_for_one_number_are_said(tmp_path: Path, names: list[str]) -> None:
    groups, warnings = group(tmp_path, names)
    assert len(groups["train"]) == 2
    assert any("its shards are named in 2 ways" in warning for warning in warnings)


def test_numbers_in_unknown_places_are_said(tmp_path: Path) -> None:
    groups, warnings = group(tmp_path, [f"train-{number:06d}-shuffled" for number in range(7)])
    assert len(groups) == 7
    assert "7 splits differ in a number only ('train-000000-shuffled', " in warnings[0]
    assert warnings[0].endswith("...): rename their shards to SPLIT-NUMBER.tar if they are one split")
    assert "no split is named 'train'" in warnings[1]


@pytest.mark.parametrize(
    "names",
    [
        ["00000-train", "00001-train"],
        ["train-000000-000999", "train-001000-001999"],
        ["train-r0-000000", "train-r1-000000"],
        ["train-w00-s000", "train-w01-s000"],
        ["shard_0_train", "shard_1_train", "shard_0_val"],
    ],
)
def test_two_splits_that_differ_in_a_number_are_said(tmp_path: Path, names: list[str]) -> None:
    assert group(tmp_path, names)[1][0].startswith(f"2 splits differ in a number only ('{names[0][:8]}")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train-000000", "train-000000 (1)"], "train-000000 (1).tar is named like a copy of train-000000.tar"),
        (
            ["train-000000", "train-000000-copy", "train-000001"],
            "train-000000-copy.tar is named like a copy of train-000000.tar",
        ),
        (
            ["train-000000", "train-000000 - Copy (2)"],
            "train-000000 - Copy (2).tar is named like a copy of train-000000.tar",
        ),
        (["train-000000", "Copy of train-000000"], "Copy of train-000000.tar is named like a copy of train-000000.tar"),
        (["train-000000", "train-000000_old"], "train-000000_old.tar is named like a copy of train-000000.tar"),
        (["train-000000", "train-000000.1"], "train-000000.1.tar is named like a copy of train-000000.tar"),
        (["train", "train (1)"], "train (1).tar is named like a copy of train.tar"),
        (
            ["train-00000-of-00001", "train-00000-of-00001 (1)"],
            "train-00000-of-00001 (1).tar is named like a copy of train-00000-of-00",
        ),
        (["train-0", "train-1", "Train-2"], "splits 'Train' and 'train' differ in case only"),
        (["train-000000-abc123def", "train-000000-def123abc"], "train-000000-def123abc.tar have one number"),
    ],
)
def test_copies_of_shards_are_said(tmp_path: Path, names: list[str], said: str) -> None:
    _, warnings = group(tmp_path, names)
    assert said in warnings[0]


@pytest.mark.parametrize("names", [["train", "train-extra-0", "val-2"], ["train-0", "train2-0", "test_dev"]])
def test_splits_whose_names_begin_alike_are_not_copies(tmp_path: Path, names: list[str]) -> None:
    assert group(tmp_path, names)[1] == []


def test_a_suffix_in_upper_case_is_a_shard(tmp_path: Path) -> None:
    (tmp_path / "train-000001.TAR").touch()
    groups, warnings = group(tmp_path, ["train-000000"])
    assert (groups, warnings) == ({"train": ["train-000000", "train-000001.TAR"]}, [])
    (tmp_path / "train-000001.tar").touch()
    assert "train-000001.TAR and train-000001.tar have one number" in group(tmp_path, [])[1][0]


def test_shards_in_sub_folders_are_said(tmp_path: Path) -> None:
    for name in ("train/000000", "train/000001", "val/000000", "deep/er/0", ".hidden/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.tar").touch()
    said = r"in sub-folders:? deep/er \(1\), train \(2\), val \(1\)"
    with pytest.raises(
        DataError, match=rf"no shards \(\*.tar\) here, but {said}: move them into this folder as SPLIT-N"
    ):
        group(tmp_path, [])
    groups, warnings = group(tmp_path, ["train-000000"])
    assert groups == {"train": ["train-000000"]}
    assert len(warnings) == 1
    assert re.search(said.replace(":?", " are passed over:"), warnings[0])
    group_shards_by_split(open_folder_or_url(f"file://{tmp_path}"), warnings.append)
    assert "shards in sub-folders are passed over: train (2), val (1); move them" in warnings[1]


def test_sub_folders_are_seen_among_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one lies behind the first files depends on the file system."""
    monkeypatch.setattr("foveal.data.storage.folder._MAX_FILES", 3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "000000.tar").touch()
    _, warnings = group(tmp_path, [f"train-{number:06d}" for number in range(50)])
    assert "passed over: sub (1)" in warnings[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "train.tar.000",
            r"train.tar.000 is a piece of train.tar: join the pieces, as with `cat train.tar.\* > train.tar`",
        ),
        ("train.tar.aa", "train.tar.aa is a piece of train.tar:"),
        ("train.tar.gz.part-01", "train.tar.gz.part-01 is a piece of train.tar.gz: join"),
        ("train.tar.partaa", "train.tar.partaa is a piece of train.tar: join"),
        ("train.tgz.001", "train.tgz.001 is a piece of train.tgz: join"),
        ("train.tar.gz", "train.tar.gz is compressed, .* unpack it to train.tar"),
        ("train.TAR.xz", "train.TAR.xz is compressed, .* unpack it to train.TAR"),
        ("train.tgz", "train.tgz is compressed, .* unpack it to train.tar"),
    ],
)
def test_pieces_and_compressed_shards_are_refused(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=sentence):
        group(tmp_path, ["val-0"])
    (tmp_path / ("train.TAR" if "TAR" in name else "train.tar")).touch()
    assert "train" in group(tmp_path, [])[0], "the whole shard is there too"


def test_hidden_shards_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "._train-000000.tar.gz").touch()
    groups, warnings = group(tmp_path, ["train-000000", "._train-000000", ".train-000001"])
    assert groups == {"train": ["train-000000"]}
    assert warnings == ["hidden shards are passed over: 2, the first is ._train-000000.tar"]


def test_the_command_prints_the_splits_that_it_understood(tmp_path: Path, write_tar, png: bytes) -> None:
    for number in (0, 1, 3):
        write_tar(tmp_path / f"train-{number:05d}-of-00004.tar", [("a.png", png), ("a.cls", b"0")])
    result = CliRunner().invoke(app, ["data", "index", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].split()[:5] == ["train", "3", "samples", "3", "shards"]
    assert lines[1].endswith("train-00000-of-00004.tar to train-00003-of-00004.tar")
    assert lines[2] == "train: 1 of 4 shards is missing, by their names: number 2"
