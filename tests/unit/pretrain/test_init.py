"""Pretraining from initial weights: accepted sources, the report, and refused weights."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.config import Positions, VitConfig
from foveal.models.sincos import sincos_positions
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export
from pretrain.config import PretrainConfig
from pretrain.plan import plan_pretraining
from pretrain.train import build

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"patch": 4, "width": 32, "depth": 2, "heads": 2}
TINY = VitConfig(name="vit_tiny_patch16_224", **SIZES)


def settings(digits: Path, init: Path | None, positions: Positions = "learned", **further: Any) -> PretrainConfig:
    tree = {
        "epochs": 1,
        "init": None if init is None else str(init),
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8} | further.pop("data", {}),
        "model": TINY.to_dict() | {"positions": positions} | further.pop("model", {}),
        "decoder": {"width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 64},
        "optim": {"warmup_epochs": 1},
        "run": {"dir": "runs/x"},
    }
    return PretrainConfig.from_dict(tree | further, "here")


def encoder_of(cfg: PretrainConfig) -> nn.Module:
    model: Any = build(plan_pretraining(cfg, 1), CPU).model
    return model.encoder.eval()


def timms(folder: Path) -> Any:
    """A timm model with 3 classes, its weights saved in a folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    model = timm.create_model(TINY.name, img_size=16, in_chans=1, num_classes=3, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("of_a_file", [False, True])
def test_timms_weights_are_used(of_a_file: bool, digits: Path, tmp_path: Path) -> None:
    model = timms(tmp_path / "timm")
    cfg = settings(digits, tmp_path / "timm" / "model.safetensors" if of_a_file else tmp_path / "timm")
    images = torch.randn(2, 1, 16, 16)
    encoder: Any = encoder_of(cfg)
    torch.testing.assert_close(encoder.forward_features(images), model.forward_features(images), rtol=0, atol=0)
    source = plan_pretraining(cfg, 1).init_source
    assert source is not None
    assert set(source.loaded_keys) == set(encoder.state_dict())
    assert (source.missing_keys, source.unexpected_keys) == ((), ("head.bias", "head.weight"))
    assert [line.split() for line in plan_pretraining(cfg, 1).summary_lines()[-2:]] == [
        ["init", f"{cfg.init},", "30", "weights", "used"],
        ["unused:", "head.bias,", "head.weight"],
    ]


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("names", ["of the file", "of the module"])
def test_hugging_faces_weights_are_used(kind: str, names: str, digits: Path, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    more = {"image_size": 16, "patch_size": 4, "num_channels": 1, "layer_norm_eps": 1e-6}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ViTConfig(**sizes, **more)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    if names == "of the module":  # transformers 5 names modules differently in files
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(2, 1, 16, 16)
    expected = (model if kind == "ViTModel" else model.vit)(images).last_hidden_state
    encoder: Any = encoder_of(settings(digits, tmp_path))
    torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-5, atol=1e-5)
    source = plan_pretraining(settings(digits, tmp_path), 1).init_source
    assert source is not None
    assert {name.split(".")[0] for name in source.unexpected_keys} == {"pooler" if kind == "ViTModel" else "classifier"}
    with pytest.raises(ExportError, match=r"has heads 2, model.heads is 4; they must be equal"):
        plan_pretraining(settings(digits, tmp_path, model={"heads": 4}), 1)


def mae_weights(folder: Path, grid: tuple[int, int] = (4, 4)) -> dict[str, Tensor]:
    """Weights of a foreign masked autoencoder: fixed positions, and a decoder."""
    model = timms(folder)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    weights["pos_embed"] = torch.cat([torch.zeros(1, 32), sincos_positions(*grid, 32)])[None]
    weights |= {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 32)}
    save_file(weights, folder / "model.safetensors")
    return weights


def test_a_foreign_masked_autoencoder(digits: Path, tmp_path: Path) -> None:
    weights = mae_weights(tmp_path / "mae", grid=(2, 2))
    cfg = settings(digits, tmp_path / "mae", "sincos")
    encoder, source = encoder_of(cfg), plan_pretraining(cfg, 1).init_source
    assert source is not None
    assert source.unexpected_keys == ("decoder_embed.weight", "mask_token")
    assert plan_pretraining(cfg, 1).resized_from == 8
    assert encoder.get_parameter("pos_embed")[0, 1:].equal(sincos_positions(4, 4, 32))
    assert encoder.get_parameter("blocks.1.attn.qkv.weight").equal(weights["blocks.1.attn.qkv.weight"])


def test_the_decoder_is_the_one_of_a_fresh_run(digits: Path, tmp_path: Path) -> None:
    timms(tmp_path / "timm")
    states = [
        build(plan_pretraining(settings(digits, init), 1), CPU).model.state_dict() for init in (None, tmp_path / "timm")
    ]
    same = {name for name, value in states[0].items() if states[1][name].equal(value)}
    assert same == {name for name in states[0] if name.startswith("decoder.")}


def export(folder: Path, size: int | tuple[int, int] = 16, **head: Any) -> Path:
    torch.manual_seed(1)
    encoder = build_encoder(TINY, image_size=size, channels=1, **head)
    write_export(folder, encoder.state_dict(), Card("pretrain", encoder_card(TINY, size, 1, **head), (0.3,), (0.4,)))
    return folder


def test_an_export_of_ours_brings_its_pixels_and_its_digest(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", (8, 16))
    first = plan_pretraining(settings(digits, folder, "sincos"), 1)
    assert (first.mean, first.std, first.resized_from) == ((0.3,), (0.4,), (8, 16))
    moved = export(tmp_path / "elsewhere" / "export", (8, 16))
    assert plan_pretraining(settings(digits, moved, "sincos"), 1).science_settings() == first.science_settings(), (
        "paths are not science"
    )
    changed = plan_pretraining(settings(digits, export(tmp_path / "other"), "sincos"), 1).science_settings()
    assert {name for name in changed if changed[name] != first.science_settings()[name]} == {"inherited.init"}


def test_a_classifier_of_the_mean_has_no_last_norm(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", pooling="avg", num_classes=3)
    source = plan_pretraining(settings(digits, folder, "sincos"), 1).init_source
    assert source is not None
    assert source.missing_keys == ("norm.weight", "norm.bias")
    assert source.unexpected_keys == ("fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight")


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        ({"model": {"patch": 8}}, "has patch 4, model.patch is 8; they must be equal"),
        ({"data": {"channels": 3}}, "has channels 1, data.channels is 3; they must be equal"),
        ({"model": {"width": 64}}, "has width 32, model.width is 64; they must be equal"),
        ({"model": {"depth": 3}}, "has depth 2, model.depth is 3; they must be equal"),
        ({"model": {"mlp_ratio": 2.0}}, "has other shapes: blocks.0.mlp.fc1.weight [128, 32] for [64, 32]"),
        ({"positions": "sincos"}, "has learned positions: set model.positions=learned"),
        (
            {"model": {"name": "vit_base_patch16_rope_224", "positions": None}},
            "lacks blocks.0.gamma_1 [32], blocks.0.gamma_2 [32], ",
        ),
    ],
)
def test_foreign_weights_of_another_encoder_are_one_sentence(
    further: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    timms(tmp_path / "timm")
    with pytest.raises(ExportError) as caught:
        plan_pretraining(settings(digits, tmp_path / "timm", **further), 1)
    assert str(caught.value).startswith(f"{tmp_path / 'timm'} {sentence}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pos_embed": torch.zeros(1, 8, 32)}, "has positions of 7 patches, which are neither 4 x 4 nor a square"),
        ({"pos_embed": torch.zeros(17, 32)}, "has other shapes: pos_embed [17, 32] for [1, 17, 32]"),
        ({"reg_token": torch.zeros(1, 2, 32)}, "has registers 2, model.registers is 0; they must be equal"),
        (
            {"patch_embed.proj.weight": None},
            "has no patch embedding under timm's or Hugging Face's ViT names (its first names",
        ),
        ({"cls_token": None}, "lacks cls_token"),
        ({"pos_embed": None}, "lacks pos_embed"),
    ],
)
def test_weights_that_are_no_encoder_are_one_sentence(
    change: dict[str, Tensor | None], sentence: str, digits: Path, tmp_path: Path
) -> None:
    timms(tmp_path / "timm")
    file = tmp_path / "timm" / "model.safetensors"
    weights = load_file(file) | change
    save_file({name: value for name, value in weights.items() if value is not None}, file)
    with pytest.raises(ExportError) as caught:
        plan_pretraining(settings(digits, tmp_path / "timm"), 1)
    assert f"timm {sentence}" in str(caught.value)


def test_an_export_of_another_encoder_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    for model, sentence in (
        ({"positions": "learned"}, "has positions sincos, model.positions is learned; they must be equal"),
        ({"name": "vit_small_patch16_224"}, "has name vit_tiny_patch16_224, model.name is vit_small_patch16_224"),
        ({"heads": 4}, "has heads 2, model.heads is 4"),
    ):
        with pytest.raises(ExportError, match=sentence):
            plan_pretraining(settings(digits, folder, "sincos", model=model), 1)
    with pytest.raises(ExportError, match=r"leave data\.mean out"):
        plan_pretraining(settings(digits, folder, "sincos", data={"mean": [0.5], "std": [0.5]}), 1)
    with pytest.raises(ConfigError, match="image_size=18 is not a whole number of patches"):
        plan_pretraining(settings(digits, folder, "sincos", data={"image_size": 18}), 1)


def test_an_export_of_a_network_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    card = Card("finetune", backbone_card("test_resnet", 16, 1), (0.3,), (0.4,))
    write_export(tmp_path / "export", build_backbone("test_resnet", 16, 1).state_dict(), card)
    with pytest.raises(ExportError, match="is the timm backbone test_resnet; pretraining needs a foveal encoder"):
        plan_pretraining(settings(digits, tmp_path / "export"), 1)


def test_what_holds_no_encoder_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    pickled, empty, torn = tmp_path / "model.pth", tmp_path / "empty", tmp_path / "torn.safetensors"
    torch.save({"cls_token": torch.ones(1)}, pickled)
    empty.mkdir()
    torn.write_bytes(b"\x08\x00")
    for path, sentence in (
        (pickled, r"has no patch embedding under timm's or Hugging Face's ViT names \(its first names are cls_token"),
        (empty, r"has no model.safetensors \(it has no files\)"),
        (tmp_path / "nowhere", "is not there: give an export, or a file or folder"),
        (torn, "cannot be read"),
    ):
        with pytest.raises(ExportError, match=sentence):
            plan_pretraining(settings(digits, path), 1)


def test_weights_that_change_after_the_plan_are_not_taken(digits: Path, tmp_path: Path) -> None:
    timms(tmp_path / "timm")
    planned = plan_pretraining(settings(digits, tmp_path / "timm"), 1)
    assert planned.init_source is not None
    assert math.prod(planned.init_source.patch_grid) == 16
    with pytest.raises(ExportError, match="has changed since the run was planned"):
        build(replace(planned, init_source=replace(planned.init_source, sha256="0")), CPU)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_of_as_many_patches_are_resized(positions: Positions, digits: Path, tmp_path: Path) -> None:
    """A table of 4 x 4 patches for images of 2 x 8."""
    model = timms(tmp_path / "w")
    expected = sincos_positions(2, 8, 32)
    if positions == "sincos":
        mae_weights(tmp_path / "mae")
    else:
        expected = resample_abs_pos_embed(model.pos_embed, [2, 8], [4, 4])[0, 1:]
    folder = tmp_path / ("mae" if positions == "sincos" else "w")
    cfg = settings(digits, folder, positions, data={"image_size": [8, 32]})
    if positions == "learned":
        with pytest.raises(ExportError, match="positions that fit images of 16 x 16 and of 8 x 32 pixels"):
            plan_pretraining(cfg, 1)
        (folder / "config.json").write_text(json.dumps({"image_size": 16}))
    assert encoder_of(cfg).get_parameter("pos_embed")[0, 1:].equal(expected)
    assert plan_pretraining(cfg, 1).resized_from == 16


def test_a_run_of_before_0_2_takes_the_rows_of_as_many_patches_as_they_are(digits: Path, tmp_path: Path) -> None:
    model = timms(tmp_path / "w")
    cfg = settings(digits, tmp_path / "w", "learned", data={"image_size": [8, 32], "weights_version": 1})
    assert encoder_of(cfg).get_parameter("pos_embed").equal(model.pos_embed)
    assert plan_pretraining(cfg, 1).resized_from is None


def test_the_plan_says_what_was_taken_off(digits: Path, tmp_path: Path) -> None:
    model = timms(tmp_path / "timm")
    weights = {f"module.encoder.{name}": value for name, value in model.state_dict().items()}
    save_file(weights | {"module.loss.weight": torch.ones(1)}, tmp_path / "timm" / "model.safetensors")
    plan = plan_pretraining(settings(digits, tmp_path / "timm"), 1)
    lines = [line.strip() for line in plan.summary_lines()]
    assert lines[-4:] == [
        "prefix module. taken off",
        "names under encoder. are the encoder's",
        "1 other weights left out (loss.weight)",
        "unused: head.bias, head.weight",
    ]
    assert encoder_of(settings(digits, tmp_path / "timm")).get_parameter("cls_token").equal(model.cls_token)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"hidden_act": "quick_gelu"}, r"has the activation quick_gelu \(hidden_act in config.json\)"),
        ({"num_attention_heads": 4}, r"has heads 4, model.heads is 2; they must be equal"),
    ],
)
def test_what_weights_do_not_show_is_compared(
    config: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    timms(tmp_path / "timm")
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=sentence):
        plan_pretraining(settings(digits, tmp_path / "timm"), 1)
