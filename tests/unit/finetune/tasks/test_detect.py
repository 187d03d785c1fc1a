"""Detection: checks of the plan, initialization, forecast of a step, and export."""

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
from finetune.plan import plan_training
from finetune.task import FinetunePlan
from finetune.tasks.detect import detector_from_export, detector_from_plan
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.config import VitConfig
from foveal.models.fcos import fcos_losses_per_image
from foveal.models.vit import build_encoder, encoder_card
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


def tree(shards: Path, **overrides: Any) -> dict[str, Any]:
    data = {"path": str(shards), "image_size": [32, 48], "channels": 1, "lanes": 4}
    return {
        "epochs": 1,
        "task": overrides.pop("task", "detection"),
        "data": data | {"mean": [0.5], "std": [0.25]} | overrides.pop("data", {}),
        "batch": {"global_size": 16, "max_micro_size": 2} | overrides.pop("batch", {}),
        "optim": overrides.pop("optim", {}),
        "detect": {"width": 32, "layers": 1, "strides": [8, 16]} | overrides.pop("detect", {}),
        "engine": {"kind": "plain"},
        "run": {"dir": "runs/x"},
    } | (overrides or {"model": TINY})


def planned(shards: Path, **overrides: Any) -> FinetunePlan:
    return plan_training(FinetuneConfig.from_dict(tree(shards, **overrides), "here"), 1)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_carries_a_detector(kind: str, shards: Path) -> None:
    """Every trainable parameter has a gradient, and layer-wise decay places pyramid and head above the encoder."""
    plan = planned(shards, **ENCODERS[kind], optim={"layer_decay": 0.5})
    model = detector_from_plan(plan).train()
    output = model(torch.randn(2, 1, *plan.cfg.data.image_hw))
    assert output.locations[0].tolist() == [4, 4, 8]
    targets = torch.tensor([[[2.0, 3, 20, 28, 1]], [[0, 0, 0, 0, -1]]])
    torch.stack(fcos_losses_per_image(output, targets)).sum().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainable.values())
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_from_plan(plan, model)
        for parameter in group["params"]
    }
    assert {scales[id(parameter)] for name, parameter in trainable.items() if name.startswith("head.")} == {1.0}
    assert min(scales.values()) < 0.5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"data": {"samples_per_class": 2}}, "data.samples_per_class is for images that have one class each"),
        ({"data": {"holdout_per_class": 2}}, "data.holdout_per_class is for images that have one class each"),
        ({"model": TINY, "label_smoothing": 0.1}, "label_smoothing is for classes of images or pixels"),
        ({"model": TINY, "pooling": "token"}, "pooling is of tasks that read one feature of an image"),
        ({"trials": {"arms": {"a": None}, "lr_per_256": [1e-3]}, "model": TINY}, "top-1, which task=detection has"),
        ({"data": {"eval_size": 64}}, "cannot evaluate a microbatch of 1 images of 64 x 64"),
        ({"detect": {"strides": [8, 16, 64]}}, "use strides from 1 to 48"),
        ({"model": TINY | {"patch": 16}, "detect": {"strides": [1, 16]}}, "use strides from 2 to 48"),
        ({"detect": {"strides": [8, 24]}}, "each must be the previous one times 2, 4, 8"),
        ({"detect": {"width": 40}}, "detect.width"),
        ({"backbone": "test_vit3", "data": {"image_size": 40}}, "not a whole number of the 16 x 16 patches"),
        ({"backbone": "mixer_b16_224"}, "'mixer_b16_224' makes no feature map of images of 32 x 48 pixels"),
        (
            {"backbone": "resnet18", "data": {"image_size": 32}, "batch": {"max_micro_size": 1}},
            "cannot train on a microbatch of 1 images",
        ),
        ({"model": TINY, "task": "classification"}, "detect is for task=detection, and task=classification"),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides: dict[str, Any], sentence: str, shards: Path) -> None:
    with pytest.raises((ConfigError, DataError, ExportError)) as caught:
        planned(shards, **({"model": TINY} if set(overrides) <= {"data", "detect"} else {}), **overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_says_what_is_measured_and_networks_read_any_size(shards: Path) -> None:
    plan = planned(shards, backbone="test_resnet", data={"eval_size": [64, 96], "eval_crop_ratio": 1.0})
    assert plan.summary_lines()[-1] == "measured  on whole images, as 64 x 96 pixels"


def test_a_missing_library_has_a_name(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "finetune.tasks.average_precision.find_spec", lambda name: None if name == "pycocotools" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'foveal\[detection\]'"):
        planned(shards)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_it_starts_from_a_pretrained_encoder(pooling: str, shards: Path, tmp_path: Path) -> None:
    """The image size may differ; an encoder fine-tuned with pooling=avg has no token norm and is refused."""
    vit = VitConfig(**TINY)
    encoder = build_encoder(vit, image_size=64, channels=1, pooling=pooling)  # type: ignore[arg-type]
    card = Card("pretrain", encoder_card(vit, 64, 1, pooling=pooling), (0.3,), (0.4,))  # type: ignore[arg-type]
    write_export(tmp_path / "export", encoder.state_dict(), card)
    overrides = {"data": {"mean": None, "std": None}, "init": str(tmp_path / "export")}
    if pooling == "avg":
        with pytest.raises(ExportError, match="no norm behind its tokens"):
            planned(shards, **overrides)
        return
    plan = planned(shards, **overrides)
    assert plan.mean == (0.3,)
    weights = detector_from_plan(plan).encoder.state_dict()
    assert all(weights[name].equal(value) for name, value in encoder.state_dict().items() if name != "pos_embed")


def test_a_step_is_foreseen(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.yaml").write_text(yaml.safe_dump(tree(shards)))
    estimate = forecast("finetune", tmp_path / "boxes.yaml")
    model = detector_from_plan(estimate.plan)  # type: ignore[arg-type]
    assert estimate.parameter_counts.trainable == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert estimate.flops_per_sample.forward_backward > 2 * estimate.flops_per_sample.forward > 0
    assert estimate.memory_estimate.micro > 0


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
    weights: dict[str, Tensor] = model.state_dict()
    assert all(weights[f"encoder.{name}"].equal(value) for name, value in encoder.items())
    untrained = detector_from_plan(planned(shards, model=TINY, seed=5)).state_dict()
    assert not weights["head.fcos.classification_head.cls_logits.weight"].equal(
        untrained["head.fcos.classification_head.cls_logits.weight"]
    )
    # The next stage starts from the encoder and ignores the head.
    next_plan = planned(shards, init=str(export), data={"mean": None, "std": None})
    assert detector_from_plan(next_plan).encoder.state_dict()["norm.weight"].equal(encoder["norm.weight"])
