"""Predictions of exports that foveal 0.1.0 evaluated measure what its evaluations measured, by their cards."""

import io
import json
import math
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from finetune.tasks.average_precision import ImageDetections, ap_by_threshold_and_class
from foveal.cli import app
from foveal.weights.export import read_card

FIXTURES = Path(__file__).parents[2] / "fixtures" / "v0_1_0"


def predict(export: Path, data: str, out: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """Predict on the split val of a data set; return the rows by the key of their sample."""
    shards = FIXTURES / "data" / data / "val-*.tar"
    result = CliRunner().invoke(app, ["predict", str(export), str(shards), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    rows = defaultdict(list)
    for line in out.read_text().splitlines():
        row = json.loads(line)
        rows[row["image"].rpartition("#")[2]].append(row)
    return rows


def read_members(data: str, suffix: str) -> dict[str, bytes]:
    """Return the members of this suffix in the split val of a data set, by key."""
    members = {}
    for shard in sorted((FIXTURES / "data" / data).glob("val-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                stream = tar.extractfile(member)
                if field == suffix and stream is not None:
                    members[key] = stream.read()
    return members


def test_the_loss_of_a_classifier(tmp_path: Path) -> None:
    export = FIXTURES / "exports" / "classifier"
    card, rows = read_card(export), predict(export, "digits", tmp_path / "p.jsonl", "--top", "4")
    labels = {key: int(text) for key, text in read_members("digits", "cls").items()}
    assert rows.keys() == labels.keys()
    scores = [{row["class"]: row["score"] for row in rows[key]}[card.classes[label]] for key, label in labels.items()]
    loss = -sum(map(math.log, scores)) / len(scores)
    assert loss == pytest.approx(card.metrics["val_loss"], rel=1e-5)  # scores are written with six digits


def test_the_pixel_accuracy_of_a_segmenter(tmp_path: Path) -> None:
    """In windows; a mask of the image's size, as it is evaluated there."""
    export = FIXTURES / "finetune_segment/runs/finetune_segment/kept/00000002"
    rows = predict(export, "scenes", tmp_path / "p.jsonl")
    correct = labelled = 0
    for key, data in read_members("scenes", "mask.png").items():
        truth = np.asarray(Image.open(io.BytesIO(data)))
        predicted = np.asarray(Image.open(tmp_path / rows[key][0]["mask"]))
        correct += int((truth == predicted)[truth != 9].sum())
        labelled += int((truth != 9).sum())
    assert correct / labelled == read_card(export).metrics["val_pixels"]


def test_the_average_precision_of_a_detector(tmp_path: Path) -> None:
    export = FIXTURES / "finetune_detect/runs/finetune_detect/kept/00000015"
    rows = predict(export, "rectangles", tmp_path / "p.jsonl")
    images = []
    for number, (key, data) in enumerate(read_members("rectangles", "json").items()):
        truth = [[*to_corners(box["bbox"]), box["category_id"]] for box in json.loads(data)]
        predicted = [[*to_corners(row["bbox"]), row["category_id"], row["score"]] for row in rows[key]]
        images.append(ImageDetections(number, np.array(predicted).reshape(-1, 6), np.array(truth).reshape(-1, 5)))
    precision = np.nanmean(ap_by_threshold_and_class(images, 2))
    # Boxes are written with six digits, which move no overlap across a threshold here.
    assert precision == pytest.approx(read_card(export).metrics["val_map"], rel=1e-9)


def to_corners(bbox: list[float]) -> list[float]:
    left, top, width, height = bbox
    return [left, top, left + width, top + height]
