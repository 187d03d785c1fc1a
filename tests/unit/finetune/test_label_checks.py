"""What labels hold is checked when a run is planned: one sentence, or lines of the printed plan."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import id_png as png
from pictures import mask_png as mask

from finetune.config import FinetuneConfig
from finetune.plan import nested_run_config, plan_training
from foveal.data import dataset
from foveal.data.indexing.index import index_folder
from foveal.errors import ConfigError, DataError

SIDE = 16


def lines_of(
    folder: Path,
    task: str,
    train: Sequence[bytes],
    val: Sequence[bytes] | None = None,
    classes: str = "ab",
    **data: Any,
) -> list[str]:
    """Plan a run on labelled images; return the lines about labels, without what they all begin with."""
    field = {"segmentation": "mask.png", "classification": "cls"}.get(task, "json")
    image = png(np.zeros((SIDE, SIDE)))
    for split, labels in (("train", train), ("val", train if val is None else val)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number, label in enumerate(labels):
                for name, content in (("png", image), (field, label)):
                    header = tarfile.TarInfo(f"{number:03d}.{name}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    index_folder(str(folder), classes=tuple(classes), on_warning=lambda _: None)
    tree = {
        "task": task,
        "epochs": 1,
        "data": {"path": str(folder), "image_size": SIDE, "channels": 1, "lanes": 1, "mean": [0.5], "std": [0.5]}
        | data,
        "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 2},
        "optim": {"lr_per_256": 0.1, "warmup_epochs": 0},
        "engine": {"kind": "plain"},
        "run": {"dir": str(folder / "run")},
    }
    if task == "detection":
        tree["detect"] = {"width": 32, "layers": 1, "strides": [4, 8]}
    lines = plan_training(FinetuneConfig.from_dict(tree, "the test"), 1).summary_lines()
    return [line.removeprefix("labels    ") for line in lines if line.startswith("labels")]


def test_a_start_reads_the_index_of_a_shard_once(configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the labels that subsets, class weights and checks ask for, also of a set with more shards than stay open."""
    monkeypatch.setattr(dataset, "_OPEN_INDICES", 1)
    overrides = ["init=null", "class_weights=balanced", "data.holdout_per_class=2", "run.dir=runs/none"]
    model = "model={name: vit_tiny_patch16_224, patch: 4, width: 32, depth: 2, heads: 2}"
    opened = plan_training(FinetuneConfig.load(configs["finetune"], [*overrides, model]), 1).dataset
    assert opened.num_index_reads == sum(len(split.shards) for split in opened.manifest.splits.values())


def as_json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


BOX = {"bbox": [1, 1, 8, 8], "category_id": 0}
EMPTY_BOX = {"bbox": [1, 1, 8, 0], "category_id": 1}


@pytest.mark.parametrize(
    ("task", "labels", "classes", "sentence"),
    [
        ("classification", [b"0"] * 4, "a", "there is one class, 'a', and task=classification tells classes apart"),
        ("classification", [b"1"] * 4, "ab", "all labelled images of split 'train' are of class 'b', and task=classif"),
        ("segmentation", [mask(0)] * 4, "a", "there is one class, 'a', and task=segmentation tells classes apart"),
        (
            "segmentation",
            [mask(0, 255)] * 4,
            "ab",
            "split 'train': every labelled pixel of 4 masks is of class 'a' (id 0)",
        ),
        ("segmentation", [mask(255)] * 4, "ab", "no pixel of 4 masks has a class"),
        ("segmentation", [png(np.zeros((SIDE, SIDE, 3)))] * 4, "ab", "pixels of mode RGB are not class ids"),
        ("segmentation", [mask(0, 1, 7)] * 4, "ab", "has id 7 in its mask, and there are 2 classes"),
        ("multilabel", as_json([1, 0], [0, 1], [1, 0], [0, 1]), "ab", "which look one-hot"),
        ("multilabel", as_json([0, 1, 1], [0], [1], [2]), "abc", "[0, 1, 1], which look one-hot"),
        ("detection", as_json(*[[{"bbox": [0.1, 0.1, 0.5, 0.5], "category_id": 0}]] * 4), "ab", "bbox is in pixels"),
        ("detection", as_json(*[[EMPTY_BOX]] * 4), "ab", "none of 4 lists of boxes has a box to learn"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    tmp_path: Path, task: str, labels: list[bytes], classes: str, sentence: str
) -> None:
    with pytest.raises(DataError) as caught:
        lines_of(tmp_path, task, labels, classes=classes)
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_labels_of_a_run_that_has_begun_are_not_looked_at(tmp_path: Path) -> None:
    """It may have begun before this look, and its restarts read no labels for it."""
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError):
        lines_of(tmp_path, "segmentation", [mask(255)] * 4)
    (tmp_path / "run" / "science.json").touch()
    assert lines_of(tmp_path, "segmentation", [mask(255)] * 4) == []


@pytest.mark.parametrize(
    ("task", "train", "val", "classes", "lines"),
    [
        ("classification", [b"0", b"1"] * 2, [b"0", b"1"], "ab", []),
        (
            "classification",
            [b"0", b"1"] * 2,
            [b"0", b"2"],
            "abc",
            [
                "1 of 3 classes have no image in split 'train', to train on: 'c'",
                "1 of 3 classes have no image in split 'val', to evaluate on: 'b'",
            ],
        ),
        (
            "segmentation",
            [mask(0, 1, 1, 255)] * 4,
            [mask(0, 255)],
            "ab",
            ["split 'train': 4 masks: b 50%, a 25%, no class 25%", "split 'val': 1 masks: a 50%, no class 50%"],
        ),
        (
            "segmentation",
            [mask(0, 1)] * 4,
            [mask(9)],
            "ab",
            ["split 'train': 4 masks: a 50%, b 50%", "split 'val' cannot be evaluated on: "],
        ),
        (
            "detection",
            as_json([BOX, EMPTY_BOX], *[[BOX]] * 3),
            None,
            "ab",
            [
                "split 'train': 4 lists of boxes, 4 boxes",
                "split 'train': 1 of 5 boxes have no area and are left out",
                "split 'train': class 'b': in none of 5 boxes",
            ],
        ),
        ("detection", as_json(*[[BOX]] * 4), None, "a", ["split 'train': 4 lists of boxes, 4 boxes"]),
        ("multilabel", as_json([0], [0], [], [0]), None, "a", ["split 'train': 4 lists of classes, 0.75 classes each"]),
    ],
)
def test_what_labels_hold_is_in_the_plan(
    tmp_path: Path, task: str, train: list[bytes], val: list[bytes] | None, classes: str, lines: list[str]
) -> None:
    printed = lines_of(tmp_path, task, train, val, classes)
    for line in lines:
        assert any(each.startswith(line) for each in printed), printed
    assert bool(printed) == bool(lines)


def test_runs_before_0_2_keep_lists_with_repeats(tmp_path: Path) -> None:
    labels = as_json([0, 0], [1], [1, 1], [0])
    assert lines_of(tmp_path, "multilabel", labels, decode_version=1)[0].startswith("split 'train': 4 lists of classes")


def test_only_samples_that_are_trained_on_count(tmp_path: Path) -> None:
    """A split of 'ab' of which a fold leaves both; data.val need not exist for folds."""
    assert lines_of(tmp_path, "classification", [b"0", b"1"] * 4, [b"0"], fold={"of": 2, "number": 0}) == []


MANY = "".join(map(chr, range(0x4E00, 0x4E00 + 256)))  # 256 names of one character


def test_the_default_id_of_ignored_pixels_is_asked_for_if_it_is_a_class(tmp_path: Path) -> None:
    labels = [mask(0, 254, 255)] * 4
    with pytest.raises(ConfigError, match=f"data.ignore_id=255 is the default, and the id of class '{MANY[255]}'"):
        lines_of(tmp_path, "segmentation", labels, classes=MANY)
    lines_of(tmp_path, "segmentation", labels, classes=MANY[:255])
    lines = lines_of(tmp_path, "segmentation", labels, classes=MANY, ignore_id=255)
    assert f"split 'train': pixels of class '{MANY[255]}' are ignored: data.ignore_id=255 is its id" in lines
    assert f"{MANY[255]} 33%" in lines_of(tmp_path, "segmentation", labels, classes=MANY, ignore_id=None)[0]


@pytest.mark.parametrize(("data", "is_stated"), [({}, False), ({"ignore_id": 255}, True)])
def test_nested_runs_keep_whether_the_id_was_stated(data: dict[str, Any], is_stated: bool) -> None:
    tree = {"epochs": 1, "data": {"path": "x", "image_size": SIDE} | data, "batch": {"global_size": 2}}
    tree |= {"optim": {"lr_per_256": 0.1, "warmup_epochs": 0}, "run": {"dir": "y"}}
    nested = nested_run_config(FinetuneConfig.from_dict(tree, "the test"), "folds/0", {})
    assert ("ignore_id" in nested.data.model_fields_set) == is_stated
    assert nested.data.ignore_id == 255
