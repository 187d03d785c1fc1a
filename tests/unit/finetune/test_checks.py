"""Unsupported settings of fine-tuning are refused with one sentence, before a run starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.train import build
from foveal.errors import ConfigError, DataError, ExportError, FovealError
from foveal.forecast.trace import count_sample_flops
from foveal.models.backbone import build_backbone, head_parameter_names
from foveal.models.classify import Classifier
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

TINY = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2}
DIGITS = tuple("0123456789")


def config(digits: Path, **settings: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 8, "channels": 1, "lanes": 8},
        "batch": {"global_size": 40, "max_micro_size": 40},
        "optim": {"lr_per_256": 1e-3},
        "engine": {"kind": "plain"},
        "model": TINY,
        "run": {"dir": "runs/never"},
    }
    for name, value in settings.items():
        tree[name] = tree[name] | value if isinstance(tree.get(name), dict) and value is not None else value
    return FinetuneConfig.from_dict(tree, "the test")


def export(folder: Path, **changed: Any) -> str:
    vit = VitConfig(**TINY)
    encoder = encoder_card(vit, 8, 1, pooling="avg", num_classes=10)
    model = build_encoder(vit, image_size=8, channels=1, pooling="avg", num_classes=10)
    card = {"mean": (0.3054,), "std": (0.3763,), "classes": DIGITS} | changed
    write_export(folder, model.state_dict(), Card("finetune", encoder, **card))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"mixup": 0.8, "batch": {"global_size": 40, "max_micro_size": 5}}, ConfigError, "pair the images of a microbatch, which has 5 here"),
        ({"class_weights": [1.0, 2.0]}, ConfigError, "class_weights has 2 weights for 10 classes"),
        ({"class_weights": [0.0] + [1.0] * 9}, ConfigError, "a weight is above 0"),
        ({"data": {"eval_size": 16}}, ConfigError, "data.eval_size is for labels within images"),
        ({"data": {"label_field": "json"}}, ConfigError, "data.label_field names a member with the label"),
        (
            {"trials": {"arms": {"a": None}, "lr_per_256": [1e-3]}, "task": "multilabel"},
            ConfigError,
            "trials compares top-1, which task=multilabel has not",
        ),
        (
            {
                "trials": {"arms": {"a": None}, "lr_per_256": [1e-3]},
                "early_stopping": {"metric": "val_top1", "patience": 2},
                "evaluate_every": 2,
            },
            ConfigError,
            "would stop a trial by the data that it is evaluated on",
        ),
        ({"trials": {"arms": {"../a": None}, "lr_per_256": [1e-3]}}, ConfigError, "trials.arms='../a' is no plain name"),
        (
            {"trials": {"arms": {"a": None}, "lr_per_256": [1e-3, 1e-3]}, "data": {"holdout_per_class": 2}},
            ConfigError,
            "has a rate twice",
        ),
        ({"task": "multilabel", "adversarial": {}}, ConfigError, "adversarial is for images with one class"),
        (
            {"model": None, "backbone": "levit_128s", "data": {"image_size": 224}, "dropout": 0.1},
            ConfigError,
            "before one linear head, which levit_128s does not have",
        ),
        ({"adversarial": {"separate_batchnorm": True}}, ConfigError, "BatchNorm, which vit_tiny_patch16_224 does not have"),
        ({"task": "segmentation"}, DataError, "reads members .mask.png, and its samples have"),
        ({"task": "multilabel", "class_weights": "balanced"}, ConfigError, "give a list of weights"),
        ({"task": "segmentation", "class_weights": "balanced"}, ConfigError, "none of task=segmentation; give a list"),
        ({"task": "detection", "class_weights": [1.0]}, ConfigError, "class_weights is for classes of images or pixels"),
        ({"task": "multilabel", "teacher": {"init": "x"}}, ConfigError, "teacher is for images with one class"),
        ({"task": "segmentation", "mixup": 0.5}, ConfigError, "mixup is for images with classes, and task=segmentation does not"),
        ({"task": "detection", "data": {"augment": {"rand_augment": {"ops": 2}}}}, ConfigError, "not labels within them, and task=detection"),
        ({"teacher": {"init": "nowhere"}}, FovealError, "nowhere"),
        ({"task": "masks"}, ConfigError, "task=masks does not exist; there are classification, multilabel, segmentation"),
        ({"task": "multilabel", "data": {"fold": {"of": 2, "number": 0}}}, ConfigError, "data.fold is cut class by class"),
    ],
)  # fmt: skip
def test_one_sentence(digits: Path, settings: dict[str, Any], error: type[FovealError], sentence: str) -> None:
    with pytest.raises(error) as caught:
        plan_training(config(digits, **settings), 1)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_other_classes_or_pixels(digits: Path, tmp_path: Path) -> None:
    student = plan_training(config(digits), 1)
    statistics: dict[str, Any] = {"mean": student.mean, "std": student.std}
    matching = export(tmp_path / "good", **statistics)
    plan = plan_training(config(digits, teacher={"init": matching}), 1)
    assert "inherited.teacher" in plan.science_settings()
    for name, changes, sentence in (
        ("classes", {"classes": DIGITS[::-1]}, "has classes"),
        ("mean", {"mean": (0.5,)}, "has mean"),
    ):
        folder = export(tmp_path / name, **statistics | changes)
        with pytest.raises(ExportError, match=f"{sentence}.*they must be equal"):
            plan_training(config(digits, teacher={"init": folder}), 1)
    headless = build_encoder(VitConfig(**TINY), image_size=8, channels=1).state_dict()
    card = Card("finetune", encoder_card(VitConfig(**TINY), 8, 1), **statistics, classes=DIGITS)
    write_export(tmp_path / "headless", headless, card)
    with pytest.raises(ExportError, match="has no classification head"):
        plan_training(config(digits, teacher={"init": str(tmp_path / "headless")}), 1)


def test_the_class_token_of_an_export_without_a_norm_behind_it(digits: Path, tmp_path: Path) -> None:
    """With pooling=avg the export has a norm after the pooling and none for its tokens."""
    init = {"init": export(tmp_path / "export"), "model": None}
    assert plan_training(config(digits, **init, pooling="avg"), 1).init_source is not None
    with pytest.raises(ExportError, match="pooling=avg and has no norm behind its tokens"):
        plan_training(config(digits, **init, pooling="token"), 1)


def test_weights_of_others_without_a_name(digits: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ExportError, match="for weights of others say which model of timm's they are"):
            plan_training(config(digits, init=str(path), model=None), 1)


TOKENS = {
    "a register": {"model": TINY | {"registers": 1}, "pooling": "token"},
    "timm's own": {"model": None, "backbone": "deit_tiny_distilled_patch16_224", "data": {"image_size": 32}},
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_for_a_teacher(kind: str, digits: Path, tmp_path: Path) -> None:
    """The token's logits are returned in training only, and every weight has a gradient."""
    student = plan_training(config(digits), 1)
    teacher = {"init": export(tmp_path / "teacher", mean=student.mean, std=student.std), "kind": "token"}
    plan = plan_training(config(digits, teacher=teacher, **TOKENS[kind]), 1)
    model = build(plan, torch.device("cpu")).model
    images = torch.randn(3, 1, *plan.cfg.data.image_hw, generator=torch.Generator().manual_seed(0))
    logits, token = model.train()(images, torch.empty(3, 0))
    assert logits.shape == token.shape == (3, 10)
    assert not logits.equal(token)
    (logits.sum() + token.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    expected = logits if kind == "a register" else (logits + token) / 2  # timm averages both in evaluation
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "the encoder has none; give it model.registers=1"),
        ({"model": TINY | {"registers": 1}}, "set pooling=token"),
        ({"model": None, "backbone": "test_vit", "data": {"image_size": 32}}, "which test_vit does not have"),
    ],
)
def test_no_token_for_a_teacher(settings: dict[str, Any], sentence: str, digits: Path, tmp_path: Path) -> None:
    student = plan_training(config(digits), 1)
    teacher = {"init": export(tmp_path / "teacher", mean=student.mean, std=student.std), "kind": "token"}
    with pytest.raises(ConfigError, match=sentence):
        plan_training(config(digits, teacher=teacher, **settings), 1)


def test_balanced_weights_are_one_on_average(digits: Path) -> None:
    plan = plan_training(config(digits, class_weights="balanced"), 1)
    counts = plan.dataset.class_counts("train")
    assert sum(weight * count for weight, count in zip(plan.class_weights, counts, strict=True)) == pytest.approx(
        counts.sum()
    )
    assert len({round(weight * count, 6) for weight, count in zip(plan.class_weights, counts, strict=True)}) == 1


def test_a_plan_counts_the_search_for_the_worst(digits: Path) -> None:
    """A step of pgd is a forward and half a backward; the attacked image adds a forward and a backward."""

    def training_flops(**settings: Any) -> float:
        plan = plan_training(config(digits, **settings), 1)
        return count_sample_flops(lambda device: build(plan, device), 1, (8, 8)).forward_backward

    clean = training_flops()
    assert 3 * clean < training_flops(adversarial={"steps": 2}) < 4 * clean


def test_a_comparison_is_planned_as_its_first_trial_is(digits: Path) -> None:
    """Class weights are those of the labels, and the planned step is that of a trial."""
    trials = plan_training(
        config(digits, class_weights="balanced", trials={"arms": {"a": None}, "lr_per_256": [1e-3]}), 1
    )
    single = plan_training(config(digits, class_weights="balanced"), 1)
    assert trials.class_weights == single.class_weights
    flops = [
        count_sample_flops(lambda device, plan=plan: build(plan, device), 1, (8, 8)).forward_backward
        for plan in (trials, single)
    ]
    assert flops[0] == flops[1] > 0


def test_arms_from_scratch_beside_weights_of_others(digits: Path) -> None:
    trials = {"arms": {"a": None}, "lr_per_256": [1e-3]}
    assert plan_training(config(digits, trials=trials, init_name="test_resnet"), 1).num_runs == 3


def test_a_frozen_networks_own_head_trains_whole() -> None:
    """A BatchNorm inside the head updates its statistics; those below the head are frozen."""
    network = build_backbone("repvit_m0_9", 32, 3, num_classes=5)
    prefixes = head_parameter_names("repvit_m0_9", 32, 3)
    model = Classifier(network, trainable_prefixes=prefixes).train()
    training_norms = {
        name for name, module in network.named_modules() if module.training and any(True for _ in module.buffers(False))
    }
    assert training_norms
    assert all(name.startswith("head.") for name in training_norms)
    model(torch.rand(4, 3, 32, 32))
    norms = dict(network.named_modules())
    assert all(int(norms[name].num_batches_tracked) == 1 for name in training_norms)  # type: ignore[arg-type]
    assert int(network.get_buffer("stem.conv1.bn.num_batches_tracked")) == 0
