"""Every export is a folder of timm's: plain timm builds the same model from it, with the same outputs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from encoders import KINDS, shaken
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import backbone_card, build_backbone, build_meta_backbone
from foveal.models.config import Pooling, Positions, VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, read_export, write_export
from foveal.weights.hub_files import read_hub_files
from foveal.weights.pretrained import inspect_pretrained
from foveal.weights.stated_architecture import check_stated_architecture
from foveal.weights.timm_folder import build_timm_config, explain_encoder_not_timm, explain_not_timm

VIT = "vit_tiny_patch16_224"
CLASSES = ('a "quoted" name', "cats, dogs/foxes", "犬 \u00e9\\n", "<b>&amp;</b>: #1")
MEAN, STD = (0.3, 0.4, 1 / 3), (0.2, 0.25, 0.7)
MOST_DIFFERENT = 1e-6  # relative to the largest output; the measured difference is 0


def card_of(encoder: dict[str, Any], classes: tuple[str, ...] = (), science: dict[str, Any] | None = None) -> Card:
    channels = encoder["channels"]
    return Card("finetune", encoder, MEAN[:channels], STD[:channels], classes, science=science or {})


def vit_export(
    folder: Path,
    cfg: VitConfig,
    size: int | tuple[int, int] = 16,
    *,
    channels: int = 3,
    pooling: Pooling = "token",
    classes: tuple[str, ...] = (),
) -> torch.nn.Module:
    """Write the export of an encoder with drawn weights, and return the encoder."""
    torch.manual_seed(0)
    encoder = build_encoder(cfg, image_size=size, channels=channels, pooling=pooling, num_classes=len(classes))
    shaken(encoder)
    card = encoder_card(cfg, size, channels, pooling=pooling, num_classes=len(classes))
    write_export(folder, encoder.state_dict(), card_of(card, classes))
    return encoder.eval()


def backbone_export(
    folder: Path, name: str, size: int | tuple[int, int], channels: int = 3, classes: tuple[str, ...] = ()
) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_backbone(name, size, channels, num_classes=len(classes))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    write_export(folder, model.state_dict(), card_of(backbone_card(name, size, channels, len(classes)), classes))
    return model.eval()


def random_images(size: int | tuple[int, int], channels: int = 3) -> Tensor:
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_timm_has_its_outputs(folder: Path, ours: torch.nn.Module, images: Tensor) -> Any:
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected, outputs = ours(images), theirs(images)
    assert expected.abs().max() > 1e-3, "the outputs say something"
    assert expected.std() > 1e-4
    difference = ((outputs - expected).abs().max() / expected.abs().max()).item()
    assert difference <= MOST_DIFFERENT, f"{folder.name}: {difference:.2g}"
    return theirs


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_an_encoder_of_every_kind(name: str, positions: Positions | None, pooling: Pooling, tmp_path: Path) -> None:
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3, positions=positions)
    encoder = vit_export(tmp_path / "export", cfg, pooling=pooling)
    assert_timm_has_its_outputs(tmp_path / "export", encoder, random_images(16))


@pytest.mark.parametrize(
    ("name", "cfg", "size", "channels", "pooling"),
    [
        (VIT, {"patch": 2, "mlp_ratio": 2.5, "registers": 3}, (6, 8), 1, "avg"),
        (VIT, {"patch": 8, "depth": 1, "heads": 4, "positions": "learned"}, (16, 24), 3, "token"),
        ("vit_small_patch16_rope_224", {"positions": None, "registers": 2}, (8, 24), 1, "token"),
        ("vit_base_patch16_rope_mixed_224", {"positions": None}, (24, 8), 3, "avg"),
        ("vit_relpos_medium_patch16_cls_224", {"positions": None}, (8, 16), 1, "avg"),
        ("eva02_tiny_patch14_224", {"positions": "learned", "mlp_ratio": 8 / 3}, (8, 16), 3, "avg"),
    ],
)
def test_a_classifier_of_other_shapes(
    name: str, cfg: dict[str, Any], size: tuple[int, int], channels: int, pooling: Pooling, tmp_path: Path
) -> None:
    vit = VitConfig(**({"name": name, "patch": 4, "width": 48, "depth": 2, "heads": 3} | cfg))
    folder = tmp_path / "export"
    classifier = vit_export(folder, vit, size, channels=channels, pooling=pooling, classes=CLASSES)
    theirs = assert_timm_has_its_outputs(folder, classifier, random_images(size, channels))
    assert tuple(theirs.pretrained_cfg["label_names"]) == CLASSES
    assert (theirs.num_classes, theirs.global_pool) == (len(CLASSES), pooling)
    assert resolve_model_data_config(theirs) == {
        "input_size": (channels, *size),
        "interpolation": "bicubic",
        "mean": list(MEAN[:channels]),
        "std": list(STD[:channels]),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


@pytest.mark.parametrize(
    ("name", "size", "channels", "classes"),
    [
        ("test_resnet", (32, 48), 3, CLASSES),
        ("test_convnext", 32, 1, CLASSES),
        ("test_efficientnet.r160_in1k", 32, 3, ()),
        ("test_vit", (32, 64), 1, CLASSES),
        ("deit_tiny_distilled_patch16_224", 32, 3, CLASSES),
        ("swin_tiny_patch4_window7_224", (32, 64), 3, ()),
        ("mobilenetv3_small_050", 32, 3, CLASSES),
    ],
)
def test_a_model_of_timm(
    name: str, size: int | tuple[int, int], channels: int, classes: tuple[str, ...], tmp_path: Path
) -> None:
    model = backbone_export(tmp_path / "export", name, size, channels, classes)
    theirs = assert_timm_has_its_outputs(tmp_path / "export", model, random_images(size, channels))
    assert theirs.num_classes == len(classes)


def test_timm_adapts_it_to_other_channels_classes_and_sizes(tmp_path: Path) -> None:
    """What timm does with its own weights: names of the first and the last layer, and the grid, are stated."""
    cfg = VitConfig(name=VIT, patch=4, width=48, depth=1, heads=3)
    vit_export(tmp_path / "export", cfg, (8, 16), channels=1, classes=CLASSES)
    source = f"local-dir:{tmp_path / 'export'}"
    model: Any = timm.create_model(source, pretrained=True, in_chans=3, num_classes=2, img_size=(16, 16))
    assert model(random_images(16)).shape == (2, 2)
    weights = load_file(tmp_path / "export" / "model.safetensors")
    grey = weights["patch_embed.proj.weight"]
    assert torch.allclose(model.patch_embed.proj.weight.sum(dim=1, keepdim=True), grey, atol=1e-6)
    assert model.blocks[0].mlp.fc1.weight.equal(weights["blocks.0.mlp.fc1.weight"])


def test_it_loads_where_there_is_no_foveal(tmp_path: Path) -> None:
    cfg = VitConfig(name=VIT, patch=4, width=48, depth=2, heads=3, registers=1)
    encoder = vit_export(tmp_path / "export", cfg, (8, 16), pooling="avg", classes=CLASSES)
    images = random_images((8, 16))
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = (
        "import sys; sys.modules['foveal'] = None\n"
        "import timm\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = timm.create_model('local-dir:export', pretrained=True).eval()\n"
        "outputs = model(load_file('images.safetensors')['images']).detach()\n"
        "save_file({'outputs': outputs}, 'outputs.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    outputs, expected = load_file(tmp_path / "outputs.safetensors")["outputs"], encoder(images)
    assert (outputs - expected).abs().max() <= MOST_DIFFERENT * expected.abs().max()


def test_the_evaluation_of_the_run_is_timms_transform(tmp_path: Path) -> None:
    encoder = encoder_card(VitConfig(name=VIT, patch=4, width=48, depth=1, heads=3), 16, 3)
    settings = {"data.eval_crop_ratio": 0.75, "data.augment.interpolation": "bilinear", "data.eval_size": 32}
    pixels = build_timm_config(replace(card_of(encoder, science=settings), mean=(0.5,)))["pretrained_cfg"]
    assert (pixels["crop_pct"], pixels["interpolation"], pixels["mean"]) == (0.75, "bilinear", [0.5] * 3)
    assert pixels["input_size"] == [3, 16, 16], "the encoder's, not that of windows over larger images"
    old = build_timm_config(card_of(encoder, science={"data.crop_ratio": 1.0}))["pretrained_cfg"]
    assert old["crop_pct"] == 1.0, "a name of foveal 0.1"


def test_what_timm_cannot_do_is_named(tmp_path: Path) -> None:
    encoder = encoder_card(VitConfig(name=VIT, patch=4, width=48, depth=1, heads=3), 16, 3)
    assert explain_not_timm(card_of(encoder)) is None
    segmenter = replace(card_of(encoder, CLASSES), head={"kind": "segmentation"})
    assert "no head for segmentation" in (explain_not_timm(segmenter) or "")
    assert explain_encoder_not_timm(segmenter) is None
    assert "label_names" not in build_timm_config(segmenter), "timm's label_names are a head's"

    tomorrow = card_of(encoder | {"name": "vit_of_tomorrow"})
    assert "'vit_of_tomorrow' is not a model of timm" in (explain_not_timm(tomorrow) or "")
    with pytest.raises(ExportError, match="timm cannot load this model: 'vit_of_tomorrow' is not a model of timm"):
        build_timm_config(tomorrow)
    write_export(tmp_path / "export", {"a": torch.ones(1)}, tomorrow)
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == [
        "README.md",
        "card.json",
        "model.safetensors",
    ]
    assert "is not a model of timm" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, of its own making
def test_biases_that_timm_would_resample_are_named(tmp_path: Path) -> None:
    """Nine offsets of a window of 1 x 5 patches are taken for those of 2 x 2: without the refusal, other outputs."""
    swin, size = "swin_tiny_patch4_window7_224", (32, 160)
    model = backbone_export(tmp_path / "export", swin, size)
    card = card_of(backbone_card(swin, size, 3))
    assert "of a window of 1 x 5 patches, for those of a square window" in (explain_not_timm(card) or "")
    assert not (tmp_path / "export" / "config.json").exists()
    config = build_timm_config(card_of(backbone_card(swin, (32, 64), 3)))
    config["model_args"]["img_size"] = config["pretrained_cfg"]["input_size"][1:] = list(size)
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match=r"export: [\d.e-]+"):
        assert_timm_has_its_outputs(tmp_path / "export", model, random_images(size))


def test_exports_from_before_are_read(tmp_path: Path) -> None:
    cfg = VitConfig(name=VIT, patch=4, width=48, depth=1, heads=3)
    vit_export(tmp_path / "export", cfg, classes=CLASSES)
    weights, card = read_export(tmp_path / "export")
    for name in ("config.json", "README.md"):
        (tmp_path / "export" / name).unlink()
    old_weights, old_card = read_export(tmp_path / "export")
    assert old_card == card
    assert all(value.equal(weights[name]) for name, value in old_weights.items())


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_foveal_states_no_other_function(name: str, positions: Positions | None, tmp_path: Path) -> None:
    """An export that is read as weights of others, by its name: config.json is no reason to refuse it."""
    card = card_of(encoder_card(VitConfig(name=name, positions=positions), 224, 3, pooling="avg", num_classes=4))
    (tmp_path / "config.json").write_text(json.dumps(build_timm_config(card)))
    hub = read_hub_files(tmp_path / "model.safetensors")
    own_size = tuple(timm.get_pretrained_cfg(name).input_size[1:])  # type: ignore[union-attr]
    assert check_stated_architecture(hub, build_meta_backbone(name, own_size, 3), name) == []


def test_an_export_taken_for_weights_of_others_is_read_alike(tmp_path: Path) -> None:
    data = DataConfig.from_dict({"path": "x", "image_size": 32, "channels": 1}, "here")
    vit_export(tmp_path / "vit", VitConfig(name=VIT), 32, channels=1, pooling="avg", classes=CLASSES)
    backbone_export(tmp_path / "cnn", "test_resnet", 32, 1, CLASSES)
    for folder, name in (("vit", VIT), ("cnn", "test_resnet")):
        own = inspect_pretrained(tmp_path / folder, None, data).card
        foreign = inspect_pretrained(tmp_path / folder, name, data).card
        assert (foreign.mean, foreign.std, foreign.classes) == (own.mean, own.std, own.classes)
        assert foreign.encoder == own.encoder | ({"positions": "learned"} if folder == "vit" else {})
    small = VitConfig(name=VIT, patch=4, width=48, depth=1, heads=2)
    vit_export(tmp_path / "small", small, 32, channels=1)
    with pytest.raises(ExportError, match=f"has heads 2, timm's {VIT} has 3; they must be equal"):
        inspect_pretrained(tmp_path / "small", VIT, data)


@pytest.mark.parametrize("name", [VIT, "vit_small_patch16_rope_224", "vit_relpos_medium_patch16_cls_224"])
def test_transformers_reads_it_through_timm(name: str, tmp_path: Path) -> None:
    """Hugging Face's TimmWrapper gives ``num_classes`` itself, so that it may not be among the arguments."""
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3, positions="sincos" if name == VIT else None)
    images = random_images((8, 16))
    classifier = vit_export(tmp_path / "classifier", cfg, (8, 16), pooling="avg", classes=CLASSES)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    assert tuple(theirs.config.id2label.values()) == CLASSES
    encoder = vit_export(tmp_path / "encoder", cfg, (8, 16))
    wrapper = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        outputs, features = theirs(pixel_values=images).logits, wrapper(pixel_values=images).pooler_output
        assert (outputs - classifier(images)).abs().max() <= MOST_DIFFERENT * outputs.abs().max()
        assert (features - encoder(images)).abs().max() <= MOST_DIFFERENT * features.abs().max()
