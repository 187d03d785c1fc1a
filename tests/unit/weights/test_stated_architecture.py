"""timm's config.json beside weights: a model of equal shapes and another function is refused, another name of it taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import build_meta_backbone
from foveal.weights.hub_files import read_hub_files
from foveal.weights.pretrained import inspect_pretrained
from foveal.weights.stated_architecture import check_stated_architecture

VIT = "vit_tiny_patch16_224"


def check(folder: Path, config: dict[str, Any], name: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(config))
    return check_stated_architecture(
        read_hub_files(folder / "model.safetensors"), build_meta_backbone(name, 224, 3), name
    )


@pytest.mark.parametrize(
    ("config", "name", "sentence"),
    [
        (
            {"architecture": "vit_base_patch16_clip_quickgelu_224.openai"},
            "vit_base_patch16_clip_224",
            r"in which blocks\.0\.mlp\.act is QuickGELU\(\); in vit_base_patch16_clip_224 it is GELU",
        ),
        ({"architecture": VIT, "model_args": {"act_layer": "relu"}}, VIT, "with model_args {'act_layer': 'relu'}"),
        ({"architecture": "vit_small_patch16_224", "model_args": {"num_heads": 4}}, "vit_small_patch16_224", "heads=4"),
        ({"architecture": "tf_efficientnet_b0"}, "efficientnet_b0", "in which conv_stem is Conv2dSame"),
        ({"architecture": "resnet18", "model_args": {"global_pool": "max"}}, "resnet18", "in which global_pool is"),
        ({"pretrained_cfg": {"architecture": "resnet18"}, "model_args": {"act_layer": "silu"}}, "resnet18", "SiLU"),
    ],
)
def test_a_model_of_another_function_is_refused(
    config: dict[str, Any], name: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=sentence):
        check(tmp_path, config, name)


@pytest.mark.parametrize(
    ("stated", "args", "name"),
    [
        (f"{VIT}.augreg_in21k", {}, VIT),
        ("deit_tiny_patch16_224", {}, VIT),
        ("vit_tiny_patch16_384", {"img_size": 224, "num_classes": 3, "drop_path_rate": 0.1}, VIT),
        ("resnet18", {"act_layer": "relu", "in_chans": 1}, "resnet18"),
        (None, {"act_layer": "relu"}, VIT),
    ],
)
def test_another_name_of_one_function_is_taken(
    stated: str | None, args: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert check(tmp_path, {"architecture": stated, "model_args": args}, name) == []


def test_a_model_that_timm_does_not_know_is_said(tmp_path: Path) -> None:
    notes = check(tmp_path, {"architecture": "vit_of_tomorrow"}, VIT)
    assert notes == [f"config.json states timm's vit_of_tomorrow, which this timm cannot build; taken for {VIT}"]


def test_it_is_checked_at_inspection_except_in_runs_of_before_0_2(tmp_path: Path) -> None:
    save_file(timm.create_model(VIT, num_classes=0).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": VIT, "model_args": {"act_layer": "relu"}}))
    data = {"path": "x", "image_size": 224}
    inspect_pretrained(tmp_path, VIT, DataConfig.from_dict(data | {"weights_version": 1}, "here"))
    with pytest.raises(ExportError, match="the same weights would give other features"):
        inspect_pretrained(tmp_path, VIT, DataConfig.from_dict(data, "here"))
