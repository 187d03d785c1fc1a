"""`foveal predict`: what evaluation predicts, in every format, whole or not at all."""

import csv
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from exports import ODD_CLASSES, export_classifier, export_detector, export_encoder, export_segmenter, write_photos
from PIL import Image
from typer.testing import CliRunner

import foveal
from finetune.tasks.classify import Classification
from finetune.tasks.detect_metrics import DETECTION_LIMITS
from foveal.cli import app
from foveal.data.image.masks import MaskReader
from foveal.data.image.targets import AppliedCrop
from foveal.errors import ConfigError, DataError, FovealError
from foveal.inference.exported_model import ExportedModel
from foveal.models.fcos import decode_detections
from foveal.models.sliding_window import iter_sliding_window_log_probs


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_classifier(tmp_path_factory.mktemp("classifier") / "export")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images in two folders; 0.png and 1.jpg are in both."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 3)
    write_photos(folder / "more", 2, size=(20, 50))
    return folder


def predict(*arguments: Any, code: int = 0) -> str:
    """Run the command; return what it printed."""
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    if isinstance(result.exception, FovealError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def run_module(model: ExportedModel, file: Path | str) -> Any:
    with torch.no_grad():
        return model.module(model.transform(file)[None])


# --- tables ---


@pytest.mark.parametrize(("task", "scores"), [("classification", "softmax"), ("multilabel", "sigmoid")])
def test_classes_and_scores_survive_every_format(task: str, scores: str, photos: Path, tmp_path: Path) -> None:
    export = export_classifier(tmp_path / "export", task=task)
    for suffix in ("csv", "jsonl", "parquet"):
        said = predict(export, photos, "--out", tmp_path / f"t.{suffix}", "--top", 7, "--batch-size", 2)
        assert "35 rows of 5 images" in said
    rows = read_json_lines(tmp_path / "t.jsonl")
    assert [row["image"] for row in rows[::7]] == [str(file) for file in sorted(photos.glob("*.*"))] + [
        str(file) for file in sorted(photos.glob("more/*"))
    ]
    assert rows == pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert rows == [row | {"score": float(row["score"])} for row in read_csv(tmp_path / "t.csv")]
    assert {row["class"] for row in rows} == set(ODD_CLASSES)
    model = foveal.load(export)
    for first in range(0, 35, 7):
        logits = run_module(model, rows[first]["image"])[0]
        expected = logits.softmax(0) if scores == "softmax" else logits.sigmoid()
        order = expected.argsort(descending=True).tolist()
        of_image = rows[first : first + 7]
        assert [row["class"] for row in of_image] == [ODD_CLASSES[label] for label in order]
        # Batches of two and of one may differ in the last bits, and six digits are written.
        assert [row["score"] for row in of_image] == pytest.approx(expected[order].tolist(), rel=1e-5)


def test_the_screen_shows_five_classes_of_each_image(classifier: Path, photos: Path) -> None:
    lines = predict(classifier, photos / "0.png", photos / "more").splitlines()
    assert lines[0].split() == ["image", "class", "score"]
    assert len(lines) == 1 + 3 * 5, "a line break in a name breaks no line"
    assert [line.startswith(("…", "/")) for line in lines[1:]] == ([True] + [False] * 4) * 3


def test_an_encoder_is_sent_to_embed(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoder without a head: `foveal embed` computes its features"):
        predict(export_encoder(tmp_path / "export"), photos)


# --- tasks ---


def test_masks_are_those_of_the_evaluation(photos: Path, tmp_path: Path) -> None:
    """Windows of 16 pixels on 24 x 32, as the card says; the file has the image's size and is a label that can be read."""
    export, out = export_segmenter(tmp_path / "export"), tmp_path / "p.jsonl"
    predict(export, photos, "--out", out, "--overlays", tmp_path / "drawn", "--batch-size", 2)
    rows = read_json_lines(out)
    masks = {row["image"]: row["mask"] for row in rows}
    assert len(set(masks.values())) == 5 == len(list((tmp_path / "p-masks").iterdir()))
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == sorted(
        Path(mask).name for mask in masks.values()
    )
    model = foveal.load(export)
    reader = MaskReader("mask.png", ODD_CLASSES, ignore_id=255)
    for image, mask in masks.items():
        with torch.no_grad():
            inputs = model.transform(image)[None]
            (log_probs,) = iter_sliding_window_log_probs(model.module, inputs, (16, 16), 0.5)
        expected = log_probs.argmax(dim=0).numpy()
        with Image.open(image) as opened:
            size = opened.size
        _, frame = model.transform.decode(Path(image).read_bytes())
        whole = AppliedCrop.whole_image(*size)
        ids = reader.read_label((tmp_path / mask).read_bytes(), whole, "here")
        assert np.array_equal(ids, frame.ids_to_image(expected.astype(np.int16), -1))
        shares = {row["class"]: row["fraction"] for row in rows if row["image"] == image}
        counts = np.bincount(expected.ravel(), minlength=len(ODD_CLASSES)) / expected.size
        assert shares == pytest.approx({ODD_CLASSES[k]: share for k, share in enumerate(counts) if share}, rel=1e-5)
        with Image.open(tmp_path / mask) as opened:
            assert (opened.mode, opened.size) == ("P", size)


def test_boxes_are_those_of_the_evaluation(photos: Path, tmp_path: Path) -> None:
    """In pixels of the image: of 40 x 32 the middle 32 x 32 is seen, as 16 x 16."""
    export = export_detector(tmp_path / "export")
    for suffix in ("csv", "jsonl"):
        predict(export, photos / "1.jpg", "--out", tmp_path / f"b.{suffix}", "--overlays", tmp_path / suffix)
    model = foveal.load(export)
    (expected,) = decode_detections(run_module(model, photos / "1.jpg"), (16, 16), **DETECTION_LIMITS)
    assert len(expected.scores) > 3
    rows = read_json_lines(tmp_path / "b.jsonl")
    assert [row["category_id"] for row in rows] == expected.classes.tolist()
    assert [row["class"] for row in rows] == [ODD_CLASSES[label] for label in expected.classes]
    assert [row["score"] for row in rows] == pytest.approx(expected.scores.tolist(), rel=1e-5)
    boxes = np.array([row["bbox"] for row in rows])
    left_top, right_bottom = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    in_image = expected.boxes.numpy() * 2 + np.array([4, 0, 4, 0])
    np.testing.assert_allclose(np.hstack([left_top, right_bottom]), in_image, atol=2e-4)  # six digits are written
    flat = read_csv(tmp_path / "b.csv")
    assert [[float(row[name]) for name in ("left", "top", "width", "height")] for row in flat] == boxes.tolist()
    assert len(list((tmp_path / "csv").iterdir())) == 1


def test_nothing_detected_is_no_row(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTION_LIMITS, "score_threshold", 1.0)
    export = export_detector(tmp_path / "export")
    assert "0 rows of 5 images" in predict(export, photos, "--out", tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.column_names == ["image", "class", "score", "left", "top", "width", "height"]
    assert "nothing" in predict(export, photos / "0.png")


# --- what goes wrong ---


def test_unreadable_images_are_listed_and_the_others_predicted(classifier: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/1.jpg").write_bytes(b"no image")
    (tmp_path / "photos/more/0.png").write_bytes((photos / "0.png").read_bytes()[:500])
    said = predict(classifier, tmp_path / "photos", "--out", tmp_path / "t.csv", "--top", 1, code=1)
    assert "2 of 5 images cannot be read and were left out:" in said
    assert f"{tmp_path}/photos/1.jpg: no image in one of the formats" in said
    names = [Path(row["image"]).name for row in read_csv(tmp_path / "t.csv")]
    assert names == ["0.png", "2.png", "1.jpg"]
    for file in (tmp_path / "photos").rglob("*.*g"):
        file.write_bytes(b"")
    assert "5 of 5 images" in predict(classifier, tmp_path / "photos", "--out", tmp_path / "none.csv", code=1)
    assert read_csv(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--out", "t.csv"), "t.csv exists and is not overwritten"),
        (("--out", "t.txt"), r"says no format: end it in .csv, .parquet, .jsonl"),
        (("--out", "none/t.csv"), "there is no folder"),
        (("--overlays", "t.csv"), "t.csv exists and is not overwritten"),
        (("--device", "tpu"), "--device tpu does not exist; there are auto, cpu, cuda"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_read(
    options: tuple[str, str], sentence: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("kept")
    with pytest.raises(ConfigError, match=sentence):
        predict("no-such-export", photos, *options)
    assert Path("t.csv").read_text() == "kept"


def test_an_existing_folder_of_masks_is_kept(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "p-masks").mkdir()
    with pytest.raises(ConfigError, match="p-masks exists and is not overwritten"):
        predict(export_segmenter(tmp_path / "export"), photos, "--out", tmp_path / "p.csv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export", "p-masks"]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process become larger, as on a disk that fills."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    suffix: str, photos: Path, classifier: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"t.{suffix}"
    with file_size_limit(200), pytest.raises(DataError, match=rf"t.{suffix} cannot be written \(File too large\)"):
        predict(classifier, photos, "--out", out)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_masks(photos: Path, tmp_path: Path) -> None:
    export = export_segmenter(tmp_path / "export")
    with file_size_limit(100), pytest.raises(DataError, match=r"p-masks cannot be written \(File too large\)"):
        predict(export, photos, "--out", tmp_path / "p.csv", "--overlays", tmp_path / "drawn")
    assert [file.name for file in tmp_path.iterdir()] == ["export"]


def test_ctrl_c_leaves_nothing(classifier: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    original = Classification.predict
    monkeypatch.setattr(Classification, "predict", interrupted)
    predict(classifier, photos, "--out", tmp_path / "t.csv", "--overlays", tmp_path / "o", "--batch-size", 1, code=130)
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())
