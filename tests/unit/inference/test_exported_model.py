"""``foveal.load``: an export, or a run directory, as module, transform and classes."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import KINDS, encoder_of
from exports import MEAN, ODD_CLASSES, STD, export_backbone, export_classifier, export_encoder, export_segmenter
from pictures import encoded, photo
from PIL import Image

import foveal
from finetune.task import Task
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches
from foveal.errors import ConfigError, ExportError
from foveal.inference.exported_model import import_task
from foveal.inference.image_transform import ImageTransform
from foveal.models.config import VitConfig
from foveal.models.vit import encoder_card
from foveal.weights.export import Card, write_export

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests" / "fixtures" / "v0_1_0"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_classifier(tmp_path_factory.mktemp("run") / "export")


def test_the_three_lines_of_the_documents_print_a_class(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python block of the README and docs/ that loads an export, on an export and a photograph of the test's."""
    photo(50, 40).save(tmp_path / "photo.jpg")
    places = {"foveal.load": str(classifier), "model.transform": str(tmp_path / "photo.jpg")}
    texts = [file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    shown = [block for block in blocks if "foveal.load(" in block]
    assert shown
    for block in shown:
        exec(re.sub(r"(foveal\.load|model\.transform)\(\"[^\"]*\"\)", lambda m: f"{m[1]}({places[m[1]]!r})", block), {})  # noqa: S102
        assert capsys.readouterr().out.rstrip("\n").strip() in {name.strip() for name in ODD_CLASSES}


def test_a_model_is_ready_to_evaluate(classifier: Path) -> None:
    model = foveal.load(classifier)
    assert model.module(torch.zeros(2, 3, 16, 16)).shape == (2, len(ODD_CLASSES))
    assert (model.classes, model.task) == (ODD_CLASSES, "classification")
    assert not model.module.training


def test_a_run_directory_is_its_export(classifier: Path) -> None:
    assert foveal.load(classifier.parent).path == classifier == foveal.load(str(classifier)).path


def test_what_is_no_export_is_said_in_a_sentence(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no export: it has no card\.json"):
        foveal.load(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ExportError, match="is a run without an export: let it finish"):
        foveal.load(tmp_path)
    for name in ("narrow", "wide"):
        shutil.copytree(classifier, tmp_path / "export" / name)
    with pytest.raises(ExportError, match=r"several exports: give one of .*/export/narrow, .*/export/wide"):
        foveal.load(tmp_path)
    with pytest.raises(ExportError, match=r"several exports: give one of .*/folds/seed3-fold0/export"):
        foveal.load(FIXTURES / "finetune_folds/runs/finetune_folds")
    (tmp_path / "export" / "wide" / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(ExportError, match="sha256 differs"):
        foveal.load(tmp_path / "export" / "wide")


def test_a_task_of_a_later_version_is_refused(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "export")
    card = json.loads((tmp_path / "export/card.json").read_text())
    card["science"]["task"] = "captions"
    (tmp_path / "export/card.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="task=captions does not exist"):
        foveal.load(tmp_path)


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_an_encoder_gives_its_pooled_feature(name: str, positions: Any, tmp_path: Path) -> None:
    """Of every kind of position, the same as before the export."""
    encoder = encoder_of(name, positions).eval()
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3, positions=positions)
    write_export(tmp_path / "e", encoder.state_dict(), Card("pretrain", encoder_card(cfg, 16, 3), MEAN, STD))
    model = foveal.load(tmp_path / "e")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (model.task, model.classes, model.settings) == ("encoder", (), {})
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), encoder(images), rtol=0, atol=0)


def test_old_names_of_settings_are_read() -> None:
    """An export of 0.1: data.val_size, data.crop_ratio, data.labels."""
    model = foveal.load(FIXTURES / "finetune_segment/runs/finetune_segment/kept/00000002")
    assert (model.task, model.transform.image_hw, model.trained_hw) == ("segmentation", (24, 32), (16, 16))
    assert (model.transform.crop_ratio, model.transform.decode_version) == (1.0, 1)
    several = foveal.load(FIXTURES / "finetune_classes/runs/finetune_classes/kept/00000002")
    assert several.task == "multilabel"
    assert isinstance(import_task(several.task), Task)


def test_the_pixels_are_those_of_an_evaluation(tmp_path: Path, classifier: Path) -> None:
    """Of the loader, with a crop, and of files of any shape."""
    images = [photo(50, 40), photo(21, 64), photo(16, 16).convert("L")]
    with tarfile.open(tmp_path / "val-000000.tar", "w") as tar:
        for number, image in enumerate(images):
            image.save(tmp_path / f"{number}.jpg")
            tar.add(tmp_path / f"{number}.jpg", f"{number}.jpg")
    index_folder(str(tmp_path), on_warning=lambda _: None)
    data = {"path": str(tmp_path), "train": "val", "image_size": 16, "eval_crop_ratio": 0.75}
    cfg = DataConfig.from_dict(data | {"mean": list(MEAN), "std": list(STD)}, "here")
    (batch,) = eval_batches(
        Dataset.open(cfg), cfg, split="val", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=3
    )
    shutil.copytree(classifier, tmp_path / "export")
    card = json.loads((tmp_path / "export/card.json").read_text())
    card["science"]["data.eval_crop_ratio"] = 0.75
    (tmp_path / "export/card.json").write_text(json.dumps(card))
    transform = foveal.load(tmp_path).transform
    for number in range(3):
        assert transform.to_pixels(tmp_path / f"{number}.jpg").equal(batch.images[number])


def test_files_bytes_and_pillow_images_are_one(classifier: Path, tmp_path: Path) -> None:
    """A camera's note on the orientation is obeyed, also by an image that Pillow has opened; alpha is dropped."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "turned.png"
    photo(40, 20).save(file, exif=exif)
    transform = foveal.load(classifier).transform
    expected = transform(file)
    assert expected.equal(transform(file.read_bytes()))
    assert expected.equal(transform(str(file)))
    with Image.open(file) as image:
        assert expected.equal(transform(image))
    upright = encoded(photo(40, 20).transpose(Image.Transpose.ROTATE_270), "PNG")
    # Turned before it is resized, its axes are resized in another order: a pixel is off by two of 255 levels at most.
    torch.testing.assert_close(transform(upright), expected, rtol=0, atol=2.01 / 255 / min(STD))
    for mode in ("RGBA", "CMYK", "P", "1", "LA"):
        assert transform(photo(20, 20).convert(mode)).shape == (3, 16, 16), mode
    with pytest.raises(UndecodableError):
        transform(b"no image")


def test_boxes_and_masks_lie_in_the_image_where_the_crop_is(tmp_path: Path) -> None:
    model = foveal.load(export_segmenter(tmp_path / "export"))
    _, frame = model.transform.decode(encoded(photo(100, 60), "PNG"))
    assert (frame.image_wh, frame.crop) == ((100, 60), (10, 0, 90, 60)), "24 x 32 pixels are 4 : 3"
    boxes = frame.boxes_to_image(torch.tensor([[0.0, 0, 32, 24], [8, 6, 16, 12]]), (24, 32))
    assert boxes.tolist() == [[10, 0, 90, 60], [30, 15, 50, 30]]
    ids = torch.arange(24 * 32).reshape(24, 32).numpy()
    whole = frame.ids_to_image(ids, -1)
    assert whole.shape == (60, 100)
    assert (whole[:, :10] == -1).all() and (whole[:, 90:] == -1).all()
    assert (whole[0, 10], whole[-1, 89]) == (0, 24 * 32 - 1)
    assert set(whole[:, 10:90].ravel().tolist()) == set(range(24 * 32)), "every pixel of the input is shown"


def test_a_model_of_timm_is_loaded(tmp_path: Path) -> None:
    model = foveal.load(export_backbone(tmp_path / "export"))
    assert model.module(model.transform(photo(40, 40))[None]).ndim == 2
    assert foveal.load(export_encoder(tmp_path / "encoder")).trained_hw == (16, 16)


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_pillow_images_of_16_bits_are_those_of_their_files(mode: str, tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    image = Image.fromarray(pixels.astype(np.int32) if mode == "I" else pixels)
    transform = ImageTransform((16, 16), 1, (0.5,), (0.5,), 1.0, "bicubic", jpeg_scaling=True)
    assert image.mode == mode
    assert transform.to_pixels(image).equal(transform.to_pixels(tmp_path / "deep.png"))
    with pytest.raises(UndecodableError, match="floating point"):
        transform.to_pixels(image.convert("F"))
