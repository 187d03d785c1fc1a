"""What transformers opens: the decoder of a pretraining run, labels, the pooled feature, the image processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_exports import CLASSES, KINDS, vit_card, written
from tiny_pretraining import STEP, finished_run

import foveal
from foveal.convert import image_processor, vit_names
from foveal.convert.formats import convert
from foveal.convert.images import read_comparison_images
from foveal.errors import ExportError
from foveal.inference.exported_model import load_exported_model

transformers = pytest.importorskip("transformers", reason="needs the extra foveal[export]")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_pix": False, "mask_ratio": 0.5},
        {"image_loss_weight": 1.0},  # has a predictor and an EMA encoder besides
        {"model": {"name": "deit3_small_patch16_224", "patch": 4, "width": 24, "depth": 1, "heads": 2}},
    ],
    ids=["default", "pixels as they are", "with an EMA", "layer scale"],
)
def test_a_pretraining_run_becomes_an_autoencoder_with_its_decoder(settings: dict[str, Any], tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", **settings)
    if "model" in settings:
        with pytest.raises(ExportError, match=r"cannot hold .*: ViT has no layer scale; .* has the encoder alone"):
            convert(run, "hf")
        assert not (run / "export-hf").exists()
        return
    conversion = convert(run, "hf")
    assert conversion.folder == run / "export-hf"
    assert [each.output for each in conversion.differences] == ["predictions of masked patches", "loss"]
    assert all(each.relative < 1e-5 for each in conversion.differences), conversion.differences
    assert f"step {STEP}" in conversion.reopened.notes[0]
    opened = transformers.AutoModelForPreTraining.from_pretrained(conversion.folder, local_files_only=True)
    assert type(opened).__name__ == "ViTMAEForPreTraining"
    assert opened.config.mask_ratio == settings.get("mask_ratio", 0.75)
    assert opened.config.norm_pix_loss == settings.get("norm_pix", True)


def test_the_export_of_a_pretraining_run_is_its_encoder(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", with_checkpoint=False)
    with pytest.raises(ExportError, match="has no checkpoint, and only a checkpoint has the decoder"):
        convert(run, "hf")
    assert convert(run / "export", "hf").reopened.library.endswith("as ViTModel")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target": "features"}, "it predicts pixels, and target=features predicts features"),
        ({"data": {"path": "data/none", "image_size": (16, 24), "channels": 3}}, "it takes square images"),
        (
            {
                "model": {
                    "name": "vit_tiny_patch16_224",
                    "patch": 4,
                    "width": 24,
                    "depth": 1,
                    "heads": 2,
                    "registers": 1,
                }
            },
            "ViT has no register tokens",
        ),
    ],
    ids=["features", "not square", "registers"],
)
def test_what_its_class_lacks_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", **settings)
    with pytest.raises(ExportError, match=reason):
        convert(run, "hf")
    assert not (run / "export-hf").exists()


def test_labels_survive_and_auto_classes_open_the_folder(tmp_path: Path) -> None:
    folder = convert(written(tmp_path / "export", *KINDS["classifier"]()), "hf").folder
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    assert [model.config.id2label[number] for number in range(3)] == list(CLASSES)
    assert model.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("kind", ["classifier", "classifier of the mean"])
def test_a_head_without_class_names_keeps_its_outputs(kind: str, tmp_path: Path) -> None:
    conversion = convert(written(tmp_path / "export", *KINDS[kind](), named=False), "hf")
    assert [difference.output for difference in conversion.differences] == ["logits"]
    model = transformers.AutoModelForImageClassification.from_pretrained(conversion.folder, local_files_only=True)
    assert model.config.num_labels == 3


def test_the_pooled_output_is_the_class_token(tmp_path: Path) -> None:
    export = written(tmp_path / "export", *KINDS["plain"]())
    model = transformers.AutoModel.from_pretrained(convert(export, "hf").folder, local_files_only=True).eval()
    own = foveal.load(export)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        answer = model(images)
        assert answer.pooler_output.equal(answer.last_hidden_state[:, 0])
        torch.testing.assert_close(answer.pooler_output, own.module(images), rtol=0, atol=1e-5)


def test_the_image_processor_makes_the_pixels_of_foveal(tmp_path: Path) -> None:
    export = written(tmp_path / "export", vit_card(size=56))
    conversion = convert(export, "hf")
    assert "image processor: pixels differ from foveal's" in conversion.reopened.notes[0]
    processor = transformers.AutoImageProcessor.from_pretrained(conversion.folder, local_files_only=True)
    model = load_exported_model(export)
    # 56 / 0.875 = 64 = 128 / 2: nothing is rounded. A crop's rim has no neighbours in foveal, and has some in transformers.
    image = Image.open(read_comparison_images(model.transform, None).files[0]).convert("RGB").resize((128, 128))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    levels = (pixels - model.transform(image)).abs() * 255 * torch.tensor(model.card.std).view(-1, 1, 1)
    assert levels[:, 4:-4, 4:-4].max() < 1.01


def test_a_wrong_name_is_seen_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = written(tmp_path / "export", *KINDS["plain"]())
    swapped = vit_names._LAYER | {"norm1": "layernorm_after", "norm2": "layernorm_before"}
    monkeypatch.setattr(vit_names, "_LAYER", swapped)
    with pytest.raises(ExportError, match=r"gives other features than foveal: .* nothing was written"):
        convert(export, "hf")
    assert [each.name for each in tmp_path.iterdir()] == ["export"]


def test_another_approximation_of_an_activation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = written(tmp_path / "export", vit_card(depth=2), std=0.02)
    monkeypatch.setattr(vit_names, "get_activation_name", lambda _encoder: "gelu_pytorch_tanh")
    with pytest.raises(ExportError, match="gives other features than foveal"):
        convert(export, "hf")


def test_a_weight_that_is_not_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = written(tmp_path / "export", *KINDS["plain"]())
    monkeypatch.delitem(vit_names._TOP_LEVEL, "norm.bias")
    with pytest.raises(ExportError, match=r"does not take the weights as written: .*layernorm\.bias"):
        convert(export, "hf")


@pytest.mark.parametrize(
    "changed", [{"do_center_crop": False, "size": {"height": 56, "width": 56}}, {"do_normalize": False}]
)
def test_another_crop_and_other_statistics_are_seen(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = written(tmp_path / "export", vit_card(size=56))
    right = image_processor.build_processor_config
    monkeypatch.setattr(image_processor, "build_processor_config", lambda transform: right(transform) | changed)
    with pytest.raises(ExportError, match="image processor makes other pixels than foveal"):
        convert(export, "hf")


def test_a_decoder_of_another_step_than_the_export_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    card = run / "export/card.json"
    card.write_text(card.read_text().replace(f'"step": {STEP}', f'"step": {STEP + 1}'))
    with pytest.raises(
        ExportError, match=f"export of step {STEP + 1}, and its newest whole checkpoint.*of step {STEP}"
    ):
        convert(run, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
