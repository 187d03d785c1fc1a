"""Plans of fine-tuning a timm model: summary, initialization, parameter groups, and checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.config import FinetuneConfig
from finetune.model import classifier_from_plan, param_groups_from_plan
from finetune.plan import plan_training, trial_config
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import BackboneCard, backbone_card, build_backbone
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.strict_yaml import read_yaml
from foveal.weights.export import Card, write_export

TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=1, heads=2)
SWIN = "swin_tiny_patch4_window7_224"


def settings(digits: Path, **overrides: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 32, "channels": 1, "lanes": 4} | overrides.pop("data", {}),
        "batch": {"global_size": 64, "max_micro_size": 16} | overrides.pop("batch", {}),
        "optim": overrides.pop("optim", {}),
        "engine": {"kind": "plain"} | overrides.pop("engine", {}),
        "run": {"dir": "runs/x"},
    }
    return FinetuneConfig.from_dict(tree | overrides, "here")


def export(folder: Path, name: str = "test_resnet", size: int = 48, names: tuple[str, ...] = ()) -> Path:
    torch.manual_seed(1)
    module = build_backbone(name, size, 1, num_classes=len(names))
    card = Card("distill", backbone_card(name, size, 1, len(names)), (0.3,), (0.4,), classes=names)
    write_export(folder, module.state_dict(), card)
    return folder


def test_a_plan_says_what_batch_norm_sees(digits: Path) -> None:
    cfg = settings(digits, backbone="resnet18")
    plan = plan_training(cfg, 1)
    assert plan.backbone == BackboneCard(timm="resnet18", image_size=32, channels=1, classes=10)
    (line,) = [line for line in plan.summary_lines() if line.startswith("norm")]
    assert line == (
        "norm      BatchNorm normalizes over a microbatch: the curve depends on the number of ranks and on "
        "batch.max_micro_size (16 images here)"
    )
    for model in ({"backbone": "pvt_v2_b0"}, {"model": TINY.to_dict()}):
        assert not [
            line for line in plan_training(settings(digits, **model), 1).summary_lines() if line.startswith("norm")
        ]


def test_the_name_is_science_and_the_seed_decides_the_weights(digits: Path) -> None:
    assert plan_training(settings(digits, backbone="test_resnet"), 1).science_settings()["backbone"] == "test_resnet"
    first, repeated, other_seed = (
        classifier_from_plan(plan_training(settings(digits, backbone="test_resnet", seed=seed), 1)).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(value.equal(repeated[name]) for name, value in first.items())
    assert not first["encoder.fc.weight"].equal(other_seed["encoder.fc.weight"])


def test_layers_learn_more_slowly_the_deeper_they_lie(digits: Path) -> None:
    plan = plan_training(settings(digits, backbone="resnet18", optim={"layer_decay": 0.5}), 1)
    model = classifier_from_plan(plan)
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_from_plan(plan, model)
        for parameter in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    for name, depth in (("conv1.weight", 9), ("layer1.0.conv1.weight", 8), ("layer4.1.bn2.bias", 1), ("fc.weight", 0)):
        assert scales[id(model.encoder.get_parameter(name))] == 0.5**depth
    plan = plan_training(settings(digits, backbone=SWIN), 1)
    model = classifier_from_plan(plan)
    undecayed = {
        id(parameter)
        for group in param_groups_from_plan(plan, model)
        if not group["weight_decay"]
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim == 1 or "relative_position_bias_table" in name)


@pytest.mark.parametrize("names", [(), ("a", "b"), tuple("0123456789"), tuple("abcdefghij")])
def test_an_export_gives_its_weights_and_a_head_of_the_same_classes(
    names: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    folder = export(tmp_path / "export", names=names)
    plan = plan_training(settings(digits, init=str(folder)), 1)
    assert (plan.mean, plan.resized_from) == ((0.3,), 48)
    assert plan.encoder == backbone_card("test_resnet", 32, 1, 10)
    torch.manual_seed(1)
    exported = build_backbone("test_resnet", 48, 1, num_classes=len(names)).state_dict()
    weights = classifier_from_plan(plan).encoder.state_dict()
    loaded = {name for name in weights if name in exported and weights[name].equal(exported[name])}
    assert weights.keys() - loaded == (set() if names == plan.classes else {"fc.weight", "fc.bias"})


def test_weights_that_others_left_are_a_start_too(digits: Path, tmp_path: Path) -> None:
    """Baselines from local files: a timm network with other classes, and one of foveal's encoders."""
    torch.manual_seed(1)
    foreign = build_backbone("test_resnet", 48, 1, num_classes=7).state_dict()
    save_file(foreign, tmp_path / "weights.safetensors")
    pixels = {"data": {"mean": [0.3], "std": [0.4]}}
    start = {"init": str(tmp_path / "weights.safetensors"), "init_name": "test_resnet"}
    plan = plan_training(settings(digits, **start, **pixels), 1)
    assert plan.encoder == backbone_card("test_resnet", 32, 1, 10)
    assert "inherited.init" in plan.science_settings()
    weights = classifier_from_plan(plan).encoder.state_dict()
    loaded = {name for name in weights if name in foreign and weights[name].equal(foreign[name])}
    assert weights.keys() - loaded == {"fc.weight", "fc.bias"}
    vit = VitConfig(name="test_vit", positions="learned")
    save_file(build_encoder(vit, image_size=160, channels=1).state_dict(), tmp_path / "vit.safetensors")
    vit_start = {"init": str(tmp_path / "vit.safetensors"), "init_name": "test_vit"}
    plan = plan_training(settings(digits, **vit_start, **pixels), 1)
    assert (plan.backbone, plan.resized_from) == (None, 160)
    assert classifier_from_plan(plan).encoder.get_parameter("pos_embed").shape[1] == 1 + 4
    with pytest.raises(ExportError, match=r"has no card\.json"):
        plan_training(settings(digits, init=start["init"], **pixels), 1)
    with pytest.raises(ConfigError, match="init_name=test_vit says what init is, and init is null"):
        plan_training(settings(digits, init_name="test_vit", model=TINY.to_dict()), 1)


def test_arms_of_a_comparison_may_be_of_any_kind(digits: Path, tmp_path: Path) -> None:
    """A trial is planned from dumped settings, as is a run that starts from its own config.yaml."""
    torch.manual_seed(0)
    vit = build_encoder(TINY, image_size=16, channels=1)
    write_export(tmp_path / "vit", vit.state_dict(), Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    arms = {"cnn": str(export(tmp_path / "cnn")), "scratch": None, "vit": str(tmp_path / "vit")}
    cfg = settings(digits, backbone="test_resnet", trials={"arms": arms, "lr_per_256": [1e-3]})
    assert plan_training(cfg, 1).num_runs == 9
    backbones = {arm: plan_training(trial_config(cfg, arm, 0, 1e-3), 1).backbone for arm in arms}
    assert {arm for arm, card in backbones.items() if card is not None} == {"cnn", "scratch"}
    single = settings(digits, backbone="test_resnet")
    single.dump(tmp_path / "config.yaml")
    reloaded = FinetuneConfig.from_dict(read_yaml(tmp_path / "config.yaml"), "config.yaml")
    assert plan_training(reloaded, 1).science_settings() == plan_training(single, 1).science_settings()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model": TINY.to_dict(), "backbone": "resnet18"}, "model and backbone exclude each other"),
        ({"backbone": "resnet18", "pooling": "token"}, "pooling=token is of foveal's encoders, resnet18 has its own"),
        ({"backbone": "resnet19"}, "'resnet19' is not a model of timm"),
        ({"backbone": "densenet121", "drop_path": 0.1}, "'densenet121' has no drop path"),
        (
            {"backbone": "vgg11", "engine": {"activation_checkpointing": True}},
            "timm cannot recompute the activations of 'vgg11'",
        ),
        ({"backbone": "inception_v3"}, "'inception_v3' cannot train on a microbatch of 16 images of 32 x 32 pixels"),
        (
            {"backbone": "resnet18", "batch": {"max_micro_size": 1}},
            "'resnet18' cannot train on a microbatch of 1 images",
        ),
        ({"backbone": "deepseek_vit_412m_enc", "data": {"image_size": 56}}, "does not make one row of logits"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(overrides: dict[str, Any], sentence: str, digits: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_training(settings(digits, **overrides), 1)


def test_an_export_that_is_something_else_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    cnn, swin = export(tmp_path / "cnn"), export(tmp_path / "swin", SWIN, size=224)
    write_export(
        tmp_path / "vit",
        build_encoder(TINY, image_size=16, channels=1).state_dict(),
        Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)),
    )
    assert plan_training(settings(digits, init=str(cnn), backbone="test_resnet"), 1).backbone is not None
    for folder, overrides, sentence in (
        (cnn, {"model": TINY.to_dict()}, "is a test_resnet, which model does not say; leave it out"),
        (cnn, {"backbone": "resnet18"}, "has timm test_resnet, the config says resnet18; they must be equal"),
        (cnn, {"data": {"channels": 3}}, "has channels 1, the config says 3; they must be equal"),
        (
            swin,
            {},
            "is a swin_tiny_patch4_window7_224 of images of 224 x 224 pixels and has weights of that size alone",
        ),
        (
            tmp_path / "vit",
            {"backbone": "resnet18"},
            "is a vit_tiny_patch16_224, which backbone does not say; leave it",
        ),
    ):
        with pytest.raises(ExportError, match=sentence):
            plan_training(settings(digits, init=str(folder), **overrides), 1)
