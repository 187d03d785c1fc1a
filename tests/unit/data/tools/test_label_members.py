"""`foveal data verify --full` reads labels where members look like them, and says which members it did not read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import id_png as png
from pictures import mask_png as mask
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.indexing.index import index_folder
from foveal.data.tools.label_members import describe_fields, is_mask_field

SIDE = 16
BOX = {"bbox": [1, 1, 8, 8], "category_id": 0}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(tmp_path: Path, write_tar: Callable[..., Path]) -> Verify:
    """Return a function that packs images with members and verifies them: exit code and what is printed."""

    def run(*samples: dict[str, bytes], classes: str | None = "ab", options: tuple[str, ...] = ()) -> tuple[int, str]:
        rows = [{"png": mask(0)} | members for members in samples]
        write_tar(
            tmp_path / "train-0.tar",
            [(f"{n}.{name}", data) for n, row in enumerate(rows) for name, data in row.items()],
        )
        index_folder(str(tmp_path), classes=tuple(classes) if classes else None, on_warning=lambda _: None)
        result = CliRunner().invoke(app, ["data", "verify", str(tmp_path), "--full", *options])
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"mask.png": png(np.zeros((SIDE, SIDE, 3)))}, "sample '0' does not decode (its mask: pixels of mode RGB"),
        ({"seg.png": mask(0, 1, 5)}, "sample '0' has id 5 in its mask, and there are 2 classes"),
        ({"mask.png": png(np.zeros((4, SIDE)))}, "has a mask of 16 x 4 pixels and an image of 16 x 16"),
        ({"mask.png": mask(0, 255)}, "every labelled pixel of 1 masks is of class 'a' (id 0)"),
        ({"json": as_json([BOX, {"bbox": [1, 1, -2, 2], "category_id": 0}])}, "has a negative side"),
        ({"json": as_json({"annotations": [BOX | {"category_id": 2}]})}, "has label 2, and labels are 0 to 1"),
        ({"json": as_json({"labels": [1, 1]})}, "which look one-hot"),
        ({"json": as_json({"labels": "0 1"})}, "nor an object with a list 'labels': its 'labels' is '0 1'"),
        ({"json": as_json({"labels": "a,b"})}, "its 'labels' is 'a,b'"),
        ({"json": as_json({"labels": {"a": 1, "b": 0}})}, "its 'labels' is {'a': 1, 'b': 0}"),
        ({"json": as_json({"a": 1, "b": 0})}, "its entries are 'a', 'b'"),
        ({"json": as_json({"labels": [[0], [1]]})}, "has label [0], and labels are 0 to 1"),
        ({"json": as_json({"labels": 1})}, "its 'labels' is 1"),
    ],
)
def test_faults_of_labels_are_found_without_a_task(verify: Verify, members: dict[str, bytes], sentence: str) -> None:
    code, output = verify(members)
    assert code == 1
    assert sentence in output


@pytest.mark.parametrize(
    ("members", "lines"),
    [
        ({"mask.png": mask(0, 1, 255)}, ["split 'train', .mask.png: 2 masks: a 34%, b 33%, no class 33%"]),
        ({"mask.png": mask(1)}, ["split 'train', .mask.png: every pixel of 2 masks is of class 'b' (id 1)"]),
        (
            {
                "json": as_json(
                    [BOX, {"bbox": [1, 1, 8, 0], "category_id": 0}, {"bbox": [9, 9, 9, 9], "category_id": 1}]
                )
            },
            [
                "split 'train', .json: 2 lists of boxes, 4 boxes",
                "split 'train', .json: 2 of 6 boxes have no area and are left out",
                "split 'train', .json: 2 of 6 boxes reach outside their image and are clipped",
            ],
        ),
        (
            {"json": as_json({"labels": [0], "annotations": [BOX]})},
            [
                "split 'train', .json: 2 lists of boxes, 2 boxes",
                "split 'train', .json: 2 lists of classes, 1 classes each",
            ],
        ),
        ({"depth.png": mask(9), "txt": b"a dog"}, ["members not read: .depth.png, .txt (--task TASK --label-field"]),
        ({"json": as_json({"caption": "a dog"})}, ["members not read: .json"]),
        ({"json": as_json({"labels": "a dog", "a": 1})}, ["members not read: .json"]),
        ({"json": as_json({"labels": [[1, 20, 30, 40]]})}, ["members not read: .json"]),
        ({"json": as_json({})}, ["members not read: .json"]),
    ],
)
def test_what_was_read_is_said(verify: Verify, members: dict[str, bytes], lines: list[str]) -> None:
    code, output = verify(members, members)
    assert code == 0, output
    for line in lines:
        assert line in output


@pytest.mark.parametrize(("classes", "label"), [("ab", {"cls": b"1"}), (None, {})])
def test_classes_of_images_are_not_those_of_masks(verify: Verify, classes: str | None, label: dict[str, bytes]) -> None:
    """The names of a set whose images have classes are theirs; ids of masks are not held against them."""
    code, output = verify({"mask.png": mask(0, 70), **label}, classes=classes)
    assert code == 0, output
    assert "split 'train', .mask.png: 1 masks: id 0 50%, id 70 50%" in output
    assert "not read" not in output


def test_labels_that_some_samples_lack_are_counted(verify: Verify) -> None:
    code, output = verify({"mask.png": mask(0, 1)}, {}, {})
    assert code == 0, output
    assert "split 'train', .mask.png: 2 of 3 samples have no such member, and a task that reads it" in output


def test_each_split_is_surveyed_by_itself(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    """Masks of 0 and 1 in train, of 0 and 255 in val: together they would hold both classes."""
    for split, label in (("train", mask(0, 1)), ("val", mask(0, 255))):
        write_tar(tmp_path / f"{split}-0.tar", [("0.png", mask(0)), ("0.mask.png", label)])
    index_folder(str(tmp_path), classes=("a", "b"), on_warning=lambda _: None)
    result = CliRunner().invoke(app, ["data", "verify", str(tmp_path), "--full"])
    assert result.exit_code == 1
    assert "split 'val', .mask.png: every labelled pixel of 1 masks is of class 'a' (id 0)" in result.output
    assert "split 'train', .mask.png: 1 masks: a 50%, b 50%" in result.output


def test_a_task_says_what_is_read_instead(verify: Verify) -> None:
    stray = {"mask.png": mask(0, 1, 7), "json": as_json([BOX])}
    assert verify(stray, options=("--task", "detection"))[0] == 0
    assert verify(stray, options=("--ignore-id", "7"))[0] == 0
    code, output = verify(stray, {}, options=("--task", "segmentation", "--ignore-id", "7"))
    assert (code, "sample '1' has no member .mask.png" in output) == (1, True)
    assert verify(stray, {}, options=("--ignore-id", "7"))[0] == 0, "without a task a label may be missing"


def test_shards_and_indices_that_are_lost_are_still_named(verify: Verify, tmp_path: Path) -> None:
    assert verify({"json": as_json([BOX])})[0] == 0
    for name in ("train-0.tar", "train-0.tar.index"):
        (tmp_path / name).unlink()
        result = CliRunner().invoke(app, ["data", "verify", str(tmp_path), "--full"])
        assert result.exit_code == 1
        assert f"{name} is missing" in result.output


def test_names_of_masks() -> None:
    names = ("mask.png", "seg.tif", "gtFine_labelIds.png", "label.png", "my-annotation.PNG", "semantic.seg.png")
    assert all(is_mask_field(name) for name in names)
    assert not any(is_mask_field(name) for name in ("png", "jpg", "depth.png", "masked.png", "mask.npy", "json"))


def test_indexing_says_what_members_are() -> None:
    assert describe_fields(("jpg", "mask.png"), None) == [
        "masks of class ids by their name: .mask.png: task=segmentation"
    ]
    assert describe_fields(("jpg", "seg.png"), None)[0].endswith("task=segmentation data.label_field=seg.png")
    assert describe_fields(("jpg", "json"), None)[0].startswith(
        ".json was not read: it may hold boxes (task=detection)"
    )
    assert describe_fields(("jpg", "json"), "species") == describe_fields(("jpg", "cls"), None) == []
