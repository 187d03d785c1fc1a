"""Pretrained models: cards of foreign weights, and refusals of files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.atomic import sha256
from foveal.data.config import DataConfig
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import BackboneCard, backbone_card, backbone_from_card, build_backbone, parse_encoder_card
from foveal.models.config import VitConfig
from foveal.models.encode import encode_cls_and_patches
from foveal.models.resize import resize_positions_from_card
from foveal.models.vit import (
    EncoderCard,
    build_encoder,
    encoder_card,
    encoder_from_card,
)
from foveal.weights.export import Card, load_weights_strict, write_export
from foveal.weights.pretrained import inspect_pretrained

SWIN = "swin_tiny_patch4_window7_224"
VIT = "vit_tiny_patch16_224"


def data(**settings: Any) -> DataConfig:
    return DataConfig.from_dict({"path": "x", "image_size": 64, "channels": 3} | settings, "here")


def create_timm_model(folder: Path, name: str, config: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """Create a timm model, and write its weights to a folder as timm does."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 7} | sizes
    model = timm.create_model(name, **options).eval()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return model


def images(channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet18", {}), ("resnet18", {"num_classes": 0}), ("densenet121", {}), (SWIN, {"img_size": 64})],
)
def test_a_model_of_timm_is_found_as_it_is(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    model = create_timm_model(tmp_path / "timm", name, **sizes)
    source = inspect_pretrained(tmp_path / "timm", name, data())
    spec = parse_encoder_card(source.card.encoder, "card")
    assert isinstance(spec, BackboneCard)
    assert (spec.build_args, spec.classes) == ((name, 64, 3), sizes.get("num_classes", 7))
    assert (source.card.stage, source.card.classes) == ("foreign", ())
    assert source.card.mean == (0.485, 0.456, 0.406)
    assert source.card.sha256 == sha256(tmp_path / "timm" / "model.safetensors")
    rebuilt = backbone_from_card(source.card.encoder, "card").eval()
    load_weights_strict(rebuilt, source.load_weights(), source.path)
    assert rebuilt(images()).equal(model(images()))


@pytest.mark.parametrize(("size", "expected"), [(64, 64), (96, 96), (112, 96)])
def test_a_vision_transformer_is_an_encoder_whose_layers_can_teach(size: int, expected: int, tmp_path: Path) -> None:
    """The card's grid is that of the position table: 6 x 6 patches, or 4 x 4."""
    model = create_timm_model(tmp_path / "timm", VIT, img_size=expected)
    source = inspect_pretrained(tmp_path / "timm" / "model.safetensors", VIT, data(image_size=size))
    spec = parse_encoder_card(source.card.encoder, "card")
    assert isinstance(spec, EncoderCard)
    assert (spec.image_size, spec.positions, spec.pooling, spec.classes) == (expected, "learned", "token", 7)
    encoder = encoder_from_card(source.card.encoder | {"image_size": size}, "card").eval()
    load_weights_strict(
        encoder, resize_positions_from_card(source.load_weights(), encoder, source.card.encoder, "card"), source.path
    )
    if size == expected:
        cls, patches = encode_cls_and_patches(encoder, images(size=size))
        tokens = model.forward_features(images(size=size))
        torch.testing.assert_close(torch.cat([cls[:, None], patches], dim=1), tokens)
        torch.testing.assert_close(encoder(images(size=size)), model(images(size=size)))


def test_positions_without_a_table_are_an_encoder_too(tmp_path: Path) -> None:
    name = "vit_relpos_medium_patch16_cls_224"
    create_timm_model(tmp_path / "timm", name, img_size=64, embed_dim=512)
    assert inspect_pretrained(tmp_path / "timm", name, data()).card.encoder["positions"] is None


def test_what_the_hub_says_beside_the_weights_is_taken(tmp_path: Path) -> None:
    """timm's config.json on the Hugging Face hub states mean, std and label_names."""
    names = [f"kind {number}" for number in range(7)]
    config = {"architecture": "resnet18", "label_names": names}
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    create_timm_model(tmp_path / "timm", "resnet18", config | {"pretrained_cfg": pixels})
    card = inspect_pretrained(tmp_path / "timm", "resnet18", data()).card
    assert (card.mean, card.std, card.classes) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), tuple(names))
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config | {"label_names": names[1:]}))
    stated = data(mean=[0.4, 0.4, 0.4], std=[0.2, 0.2, 0.2])
    card = inspect_pretrained(tmp_path / "timm", "resnet18", stated).card
    assert (card.mean, card.std, card.classes) == (stated.mean, stated.std, ())


def test_pixels_of_other_channels_must_be_stated(tmp_path: Path) -> None:
    create_timm_model(tmp_path / "timm", "resnet18", in_chans=1)
    with pytest.raises(ExportError, match=r"images of 1 channels were normalised: set data.mean and data.std"):
        inspect_pretrained(tmp_path / "timm", "resnet18", data(channels=1))
    assert inspect_pretrained(tmp_path / "timm", "resnet18", data(channels=1, mean=[0.3], std=[0.4])).card.mean == (
        0.3,
    )


def test_hugging_faces_classifier_is_a_head(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    torch.manual_seed(0)
    cfg = transformers.ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=5, layer_norm_eps=1e-6)
    model = transformers.ViTForImageClassification(cfg).eval()
    model.save_pretrained(tmp_path)
    source = inspect_pretrained(tmp_path, VIT, data())
    encoder = encoder_from_card(source.card.encoder, "card").eval()
    load_weights_strict(encoder, source.load_weights(), source.path)
    torch.testing.assert_close(encoder(images()), model(images()).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match="has heads 3, timm's vit_small_patch16_224 has 6; they must be equal"):
        inspect_pretrained(tmp_path, "vit_small_patch16_224", data())


def export(folder: Path, encoder: dict[str, Any], module: torch.nn.Module) -> Path:
    write_export(folder, module.state_dict(), Card("pretrain", encoder, (0.3,), (0.4,), classes=("a", "b")))
    return folder


def test_an_export_of_ours_is_its_own_card(tmp_path: Path) -> None:
    tiny = VitConfig(name=VIT, patch=4, width=16, depth=1, heads=2)
    encoder_export = export(tmp_path / "a", encoder_card(tiny, 16, 1), build_encoder(tiny, image_size=16, channels=1))
    backbone_export = export(
        tmp_path / "b", backbone_card("resnet18", 32, 1, 2), build_backbone("resnet18", 32, 1, num_classes=2)
    )
    for folder in (encoder_export, backbone_export):
        source = inspect_pretrained(folder, None, data(image_size=48, channels=1))
        assert (source.card.classes, source.card.stage) == (("a", "b"), "pretrain")
        assert source.load_weights().keys() == load_file(folder / "model.safetensors").keys()
    with pytest.raises(ConfigError, match="image_size=18 is not a whole number of patches"):
        inspect_pretrained(encoder_export, None, data(image_size=18, channels=1))


def test_weights_that_change_after_the_plan_are_not_taken(tmp_path: Path) -> None:
    create_timm_model(tmp_path / "timm", "resnet18")
    backbone_export = export(tmp_path / "b", backbone_card("resnet18", 32, 1), build_backbone("resnet18", 32, 1))
    sources = [
        inspect_pretrained(tmp_path / "timm", "resnet18", data()),
        inspect_pretrained(backbone_export, None, data()),
    ]
    file = tmp_path / "timm" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    export(backbone_export, backbone_card("resnet18", 32, 1), build_backbone("resnet18", 32, 1))
    for source in sources:
        with pytest.raises(ExportError, match="has changed since the run was planned"):
            source.load_weights()


@pytest.mark.parametrize(
    ("name", "settings", "kind", "sentence"),
    [
        ("resnet34", {}, ExportError, "timm lacks layer1.2.conv1.weight [64, 64, 3, 3], layer1.2.bn1.weight [64], "),
        ("resnet50", {}, ExportError, "timm lacks layer1.0.conv3.weight [256, 64, 1, 1], "),
        ("resnet18d", {}, ExportError, "timm lacks conv1.0.weight [32, 3, 3, 3], "),
        (VIT, {}, ExportError, "has names that are neither timm's of this model nor translated ("),
        ("resnet18", {"channels": 1}, ExportError, "timm has channels 3, data.channels is 1"),
        ("resnet19", {}, ConfigError, "'resnet19' is not a model of timm"),
    ],
)
def test_a_name_that_is_not_the_weights_is_one_sentence(
    name: str, settings: dict[str, Any], kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    create_timm_model(tmp_path / "timm", "resnet18")
    with pytest.raises(kind) as caught:
        inspect_pretrained(tmp_path / "timm", name, data(**settings))
    assert sentence in str(caught.value)


def test_weights_of_one_image_size_are_one_sentence(tmp_path: Path) -> None:
    create_timm_model(tmp_path / "timm", SWIN)
    with pytest.raises(ExportError) as caught:
        inspect_pretrained(tmp_path / "timm", SWIN, data())
    assert str(caught.value).startswith(
        f"{tmp_path / 'timm'} is a {SWIN} of images of 224 x 224 pixels and has weights"
    )
    assert str(caught.value).endswith("data.image_size is 64 x 64")
    assert inspect_pretrained(tmp_path / "timm", SWIN, data(image_size=224)).card.classes == ()


def test_no_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not there"):
        inspect_pretrained(tmp_path / "nowhere", "resnet18", data())
    with pytest.raises(ExportError, match="is no export"):
        inspect_pretrained(tmp_path, None, data())
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(ExportError, match="holds no weights: it has no entries"):
        inspect_pretrained(tmp_path / "model.pth", "resnet18", data())
    with pytest.raises(
        ExportError, match=r"has no card\.json, so it is no export of foveal's; for weights of others say"
    ):
        inspect_pretrained(tmp_path, None, data())
