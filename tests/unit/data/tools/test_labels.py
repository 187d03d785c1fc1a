"""`foveal data show` and `verify` with --task: labels as the task reads them, drawn on the sheet or checked."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from finetune.tasks.registry import find_task
from foveal.cli import app
from foveal.data.config import DataConfig
from foveal.data.dataset import open_unchecked_dataset
from foveal.data.image.label_drawing import GREY, make_class_palette
from foveal.data.indexing.index import index_folder
from foveal.data.tools.show import _CAPTION, _COLUMNS, _GAP, _SIDE, draw_contact_sheet

SIDE, IGNORED = 64, 9
BOX = {"bbox": [16, 16, 32, 32], "category_id": 1}


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def streets(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    """Two black images of two classes. The mask: left half class 1, right half ignored; one box of class 1."""
    mask = np.full((SIDE, SIDE), IGNORED, np.uint8)
    mask[:, : SIDE // 2] = 1
    members = {
        "png": png(np.zeros((SIDE, SIDE, 3), np.uint8)),
        "mask.png": png(mask),
        "json": json.dumps({"annotations": [BOX], "labels": [1]}).encode(),
    }
    rows = [(f"{number}.{name}", data) for number in (0, 1) for name, data in members.items()]
    write_tar(tmp_path / "train-000000.tar", rows)
    index_folder(str(tmp_path), classes=("road", "car"), on_warning=lambda _: None)
    return tmp_path


def cell(folder: Path, task: str) -> np.ndarray:
    """Return the first image of the sheet, uint8 [side, side, 3]."""
    dataset = open_unchecked_dataset(str(folder), None)
    cfg = DataConfig(path=str(folder), image_size=SIDE, ignore_id=IGNORED)
    sheet = draw_contact_sheet(dataset, "train", find_task(task).make_label_reader(cfg, dataset))
    assert sheet.size == (2 * (_SIDE + _GAP) + _GAP, _SIDE + _CAPTION + 2 * _GAP)
    assert _COLUMNS > 2
    return np.asarray(sheet)[_GAP : _GAP + _SIDE, _GAP : _GAP + _SIDE]


def test_masks_and_boxes_are_drawn_over_their_image(streets: Path) -> None:
    colour = make_class_palette(2)[1]
    masked = cell(streets, "segmentation")
    black = np.zeros(3)
    assert np.abs(masked[10, 10] - (0.6 * colour.numpy() + 0.4 * black)).max() <= 1
    assert np.abs(masked[10, -10].astype(int) - round(0.6 * GREY)).max() <= 1
    boxed = cell(streets, "detection")
    outline = (boxed == colour.numpy()).all(axis=2)  # the image is enlarged to twice its size
    rows, columns = np.nonzero(outline)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 95, 32, 95)
    assert not outline[40:88, 40:88].any()
    assert (cell(streets, "multilabel") == 0).all(), "several classes are only a caption"


def test_captions_say_the_label(streets: Path) -> None:
    dataset = open_unchecked_dataset(str(streets), None)
    cfg = DataConfig(path=str(streets), image_size=SIDE)
    captions = {"multilabel": (np.array([0, 1]), "car"), "detection": (np.array([[0, 0, 9, 9, 1.0]] * 2), "2 car")}
    captions["segmentation"] = np.array([[1, 1], [0, -1]]), "car 50%, road 25%"
    for task, (label, caption) in captions.items():
        reader = find_task(task).make_label_reader(cfg, dataset)
        assert reader is not None
        assert reader.describe_label(label) == caption


def test_verify_reads_every_label(streets: Path) -> None:
    arguments = ["data", "verify", str(streets), "--full", "--task"]
    whole = CliRunner().invoke(app, [*arguments, "segmentation", "--ignore-id", str(IGNORED)])
    assert whole.exit_code == 0, whole.output
    stray = CliRunner().invoke(app, [*arguments, "segmentation"])
    assert stray.exit_code == 1
    assert stray.output.count("has id 9 in its mask, and there are 2 classes") == 2
    missing = CliRunner().invoke(app, [*arguments, "multilabel", "--label-field", "cls"])
    assert "task=multilabel reads members .cls" in str(missing.exception)
    assert "--task detection is for --full" in str(
        CliRunner().invoke(app, ["data", "verify", str(streets), "--task", "detection"]).exception
    )
