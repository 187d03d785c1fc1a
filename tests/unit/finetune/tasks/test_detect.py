"""Fine-tuning on boxes, as it is planned: what is refused, where it starts, what a step would take, and what it leaves."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plans import forecast
from ranks import Ranks, stage_named
from rectangles import pack_rectangles
from torch import Tensor

from finetune.config import FinetuneConfig
from finetune.model import param_groups_from_plan
from finetune.plan import FinetunePlan, plan_training
from finetune.tasks.detect import detector_from_export, detector_from_plan
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.fcos import compute_fcos_losses
from foveal.models.vit import VitConfig, build_encoder, encoder_card
from foveal.weights.export import Card, read_card, read_export, write_export

TINY = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 2, "heads": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {"model": TINY | {"registers": 2}},
    "rotary": {"model": TINY | {"name": "vit_base_patch16_rope_224", "positions": None}},
    "relative": {"model": TINY | {"name": "vit_relpos_base_patch16_cls_224", "positions": None}},
    "network": {"backbone": "test_resnet"},
    "hierarchical": {"backbone": "test_convnext", "data": {"image_size": [32, 64]}},
    "pooled by attention": {"backbone": "test_vit3"},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_rectangles(tmp_path_factory.mktemp("rectangles"))


def tree(shards: Path, **further: Any) -> dict[str, Any]:
    data = {"path": str(shards), "image_size": [32, 48], "channels": 1, "lanes": 4, "labels": "boxes"}
    return {
        "epochs": 1,
        "data": data | {"mean": [0.5], "std": [0.25]} | further.pop("data", {}),
        "batch": {"images": 16, "at_once": 2} | further.pop("batch", {}),
        "optim": further.pop("optim", {}),
        "detect": {"width": 32, "layers": 1, "strides": [8, 16]} | further.pop("detect", {}),
        "engine": {"kind": "plain"},
        "run": {"dir": "runs/x"},
    } | (further or {"model": TINY})


def planned(shards: Path, **further: Any) -> FinetunePlan:
    return plan_training(FinetuneConfig.from_dict(tree(shards, **further), "here"), 1)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_carries_a_detector(kind: str, shards: Path) -> None:
    """Every parameter that learns has a gradient, and layer-wise decay puts pyramid and head above the encoder."""
    found = planned(shards, **ENCODERS[kind], optim={"layer_decay": 0.5})
    model = detector_from_plan(found).train()
    answers = model(torch.randn(2, 1, *found.cfg.data.image_hw))
    assert answers.places[0].tolist() == [4, 4, 8]
    marks = torch.tensor([[[2.0, 3, 20, 28, 1]], [[0, 0, 0, 0, -1]]])
    torch.stack(compute_fcos_losses(answers, marks)).sum().backward()
    learned = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.grad is not None and each.grad.isfinite().all() for each in learned.values())
    scales = {id(each): group["lr_scale"] for group in param_groups_from_plan(found, model) for each in group["params"]}
    assert {scales[id(each)] for name, each in learned.items() if name.startswith("head.")} == {1.0}
    assert min(scales.values()) < 0.5


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        ({"data": {"per_class": 2}}, "data.per_class is for images that have one class each"),
        ({"data": {"holdout_per_class": 2}}, "data.holdout_per_class is for images that have one class each"),
        ({"model": TINY, "label_smoothing": 0.1}, "label_smoothing is for images that have one class each"),
        ({"model": TINY, "pooling": "token"}, "with data.labels=boxes every patch is read: leave it out"),
        ({"trials": {"arms": {"a": None}, "lr_per_256": [1e-3]}, "model": TINY}, "top-1, which data.labels=boxes has"),
        ({"data": {"val_size": 64}}, "cannot evaluate a microbatch of 1 images of 64 x 64"),
        ({"detect": {"strides": [8, 16, 64]}}, "use strides from 1 to 48"),
        ({"model": TINY | {"patch": 16}, "detect": {"strides": [1, 16]}}, "use strides from 2 to 48"),
        ({"detect": {"strides": [8, 24]}}, "each must be the previous one times 2, 4, 8"),
        ({"detect": {"width": 40}}, "detect.width"),
        ({"backbone": "test_vit3", "data": {"image_size": 40}}, "not a whole number of the 16 x 16 patches"),
        ({"backbone": "mixer_b16_224"}, "'mixer_b16_224' makes no feature map of images of 32 x 48 pixels"),
        (
            {"backbone": "resnet18", "data": {"image_size": 32}, "batch": {"at_once": 1}},
            "cannot train on a microbatch of 1 images",
        ),
        ({"data": {"labels": "class"}}, "detect is for data.labels=boxes, and data.labels=class"),
    ],
)
def test_what_cannot_be_is_one_sentence(further: dict[str, Any], sentence: str, shards: Path) -> None:
    with pytest.raises((ConfigError, DataError, ExportError)) as caught:
        planned(shards, **({"model": TINY} if set(further) <= {"data", "detect"} else {}), **further)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_says_what_is_measured_and_networks_read_any_size(shards: Path) -> None:
    found = planned(shards, backbone="test_resnet", data={"val_size": [64, 96], "crop_ratio": 1.0})
    assert found.summary_lines()[-1] == "measured  on whole images, as 64 x 96 pixels"


def test_a_missing_library_has_a_name(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "finetune.tasks.average_precision.find_spec", lambda name: None if name == "pycocotools" else real(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'foveal\[detection\]'"):
        planned(shards)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_it_starts_from_a_pretrained_encoder(pooling: str, shards: Path, tmp_path: Path) -> None:
    """Of other images; one that was fine-tuned with the mean of its patches has no norm behind them."""
    vit = VitConfig(**TINY)
    encoder = build_encoder(vit, image_size=64, channels=1, pooling=pooling)  # type: ignore[arg-type]
    card = Card("pretrain", encoder_card(vit, 64, 1, pooling=pooling), (0.3,), (0.4,))  # type: ignore[arg-type]
    write_export(tmp_path / "export", encoder.state_dict(), card)
    further = {"data": {"mean": None, "std": None}, "init": str(tmp_path / "export")}
    if pooling == "avg":
        with pytest.raises(ExportError, match="no norm behind its tokens"):
            planned(shards, **further)
        return
    found = planned(shards, **further)
    assert found.mean == (0.3,)
    weights = detector_from_plan(found).encoder.state_dict()
    assert all(weights[name].equal(value) for name, value in encoder.state_dict().items() if name != "pos_embed")


def test_a_step_is_foreseen(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.yaml").write_text(yaml.safe_dump(tree(shards)))
    seen = forecast("finetune", tmp_path / "boxes.yaml")
    model = detector_from_plan(seen.plan)  # type: ignore[arg-type]
    assert seen.parameter_counts.trainable == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert seen.flops_per_sample.forward_backward > 2 * seen.flops_per_sample.forward > 0
    assert seen.memory_estimate.micro > 0


def test_what_a_run_leaves_detects_again(shards: Path, one_rank: Ranks, tmp_path: Path) -> None:
    (tmp_path / "boxes.yaml").write_text(yaml.safe_dump(tree(shards, model=TINY, seed=5)))
    one_rank.train(stage_named("finetune"), tmp_path / "boxes.yaml", tmp_path / "run")
    export = tmp_path / "run" / "export"
    model, card = detector_from_export(export), read_card(export)
    assert (card.classes, card.encoder["classes"], card.head) == (
        ("light", "dark"),
        0,
        {"width": 32, "layers": 1, "strides": [8, 16], "kind": "detection", "classes": 2},
    )
    encoder, _ = read_export(export)
    ours: dict[str, Tensor] = model.state_dict()
    assert all(ours[f"encoder.{name}"].equal(value) for name, value in encoder.items())
    fresh = detector_from_plan(planned(shards, model=TINY, seed=5)).state_dict()
    assert not ours["head.fcos.classification_head.cls_logits.weight"].equal(
        fresh["head.fcos.classification_head.cls_logits.weight"]
    )
    # The next stage begins with the encoder, and need not know of the head.
    again = planned(shards, init=str(export), data={"mean": None, "std": None})
    assert detector_from_plan(again).encoder.state_dict()["norm.weight"].equal(encoder["norm.weight"])
