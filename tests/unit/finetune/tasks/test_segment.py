"""Segmentation: loss against a loop, metrics against scikit-learn, and checks of the plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import CLASSES, scene_settings, write_scenes
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model import param_groups_from_plan
from finetune.plan import plan_training
from finetune.run import STAGE
from finetune.tasks.registry import TASKS
from finetune.tasks.segment import SegmentationLoss, segmenter_from_plan
from finetune.tasks.segment_metrics import ConfusionMatrixAndLoss
from foveal.data.batch import Batch
from foveal.errors import ConfigError, DataError, ExportError
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=32, depth=2, heads=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


class Fixed(nn.Module):
    """Model that returns fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, _images: Tensor, _drops: Tensor) -> Tensor:
        return self.logits


def batch_of(masks: Tensor) -> Batch:
    rows = torch.arange(len(masks))
    images = torch.zeros(len(masks), 3, *masks.shape[1:], dtype=torch.uint8)
    return Batch(images, rows, rows, rows, rows >= 0, step=0, epoch=0, microbatch_index=0, targets=masks)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 3.0, 0.25)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_labelled_pixels(smoothing: float, weights: tuple[float, ...]) -> None:
    """Against a loop over pixels, including the gradient."""
    random = np.random.default_rng(0)
    logits, masks = random.normal(size=(2, 3, 4, 5)), random.integers(-1, 3, (2, 4, 5))
    masks[1, 2] = -1
    objective, batch = (
        SegmentationLoss(0, smoothing, 0, (0.5,) * 3, (0.5,) * 3, torch.tensor(weights)),
        batch_of(torch.tensor(masks, dtype=torch.int16)),
    )
    model = Fixed(torch.tensor(logits, dtype=torch.float32))
    total, metrics = objective(model, batch)
    total.backward()
    loss, correct, gradient, labelled_weight = 0.0, 0.0, np.zeros_like(logits), 0.0
    for row, y, x in zip(*np.nonzero(masks >= 0), strict=True):
        pixel_logits, label = logits[row, :, y, x], masks[row, y, x]
        probabilities = np.exp(pixel_logits) / np.exp(pixel_logits).sum()
        target = np.array(weights) * (np.full(3, smoothing / 3) + np.eye(3)[label] * (1 - smoothing))
        loss -= (target * np.log(probabilities)).sum()
        correct += weights[label] * (pixel_logits.argmax() == label)
        labelled_weight += weights[label]
        gradient[row, :, y, x] = probabilities * target.sum() - target
    assert float(total.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(objective.batch_weight(batch)) == pytest.approx(labelled_weight)
    assert float(objective.batch_weight(batch_of(torch.full((2, 4, 5), -1, dtype=torch.int16)))) == 0
    assert float(metrics["train_pixel_accuracy"]) == pytest.approx(correct)
    assert model.logits.grad is not None
    np.testing.assert_allclose(model.logits.grad, gradient, atol=1e-6)


def test_overlap_is_that_of_scikit_learn() -> None:
    """Five classes: two are not in the masks, one of them nor predicted. Two matrices are summed."""
    random = np.random.default_rng(1)
    masks = random.choice([-1, 0, 1, 3], (4, 6, 7)).astype(np.int16)
    logits = torch.tensor(random.normal(size=(4, 5, 6, 7)), dtype=torch.float32)
    logits[:, 4] = -9.0
    log_probs = F.log_softmax(logits, dim=1)
    parts = [ConfusionMatrixAndLoss(5, torch.device("cpu")) for _ in range(2)]
    predictions = [parts[index // 2].update(log_probs[index], torch.tensor(masks[index])) for index in range(4)]
    metrics = parts[0].compute(lambda sums: sums + parts[1].sums, ("a", "b (1)", "b [1]", "d", "e"), "val")
    labelled = masks >= 0
    true, predicted = masks[labelled], torch.stack(predictions).numpy()[labelled]
    ious = np.array(jaccard_score(true, predicted, average=None, labels=[0, 1, 2, 3]))  # type: ignore[arg-type]
    assert [metrics.pop(f"iou_{name}") for name in ("a", "b _1__1", "b _1__2", "d")] == pytest.approx(list(ious))
    assert metrics == {
        "miou": pytest.approx(ious.mean()),
        "pixel_accuracy": pytest.approx(accuracy_score(true, predicted)),
        "loss": pytest.approx(float(F.cross_entropy(logits, torch.tensor(masks).long(), ignore_index=-1)), rel=1e-6),
    }


def test_nothing_labelled_is_nothing_to_measure_by() -> None:
    confusion = ConfusionMatrixAndLoss(2, torch.device("cpu"))
    confusion.update(torch.zeros(2, 3, 3), torch.full((3, 3), -1))
    with pytest.raises(DataError, match=r"split 'blank' has no labelled pixel to measure by: set data.val to a split"):
        confusion.compute(lambda sums: sums, CLASSES[:2], "blank")


def test_the_head_learns_fastest_and_the_seed_decides_the_weights(scenes: Path) -> None:
    for overrides in ({}, {"segment": {"head": "pyramid", "width": 16}}, {"model": None, "backbone": "test_resnet"}):
        plan = plan_training(scene_settings(scenes, **overrides), 1)
        model = segmenter_from_plan(plan)
        scales = {
            id(parameter): group["lr_scale"]
            for group in param_groups_from_plan(plan, model)
            for parameter in group["params"]
        }
        assert all(scales[id(parameter)] == 1.0 for parameter in model.head.parameters())
        assert min(scales.values()) < 0.9
        rebuilt = segmenter_from_plan(plan).state_dict()
        assert all(value.equal(rebuilt[name]) for name, value in model.state_dict().items())


def test_of_a_frozen_encoder_only_the_head_learns(scenes: Path) -> None:
    plan = plan_training(scene_settings(scenes, freeze_encoder=True, drop_path=0.0), 1)
    model = segmenter_from_plan(plan).train()
    assert model.head.training
    assert not any(module.training for module in model.encoder.modules())
    trainable = {name.partition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == {"head"}
    assert {id(parameter) for group in param_groups_from_plan(plan, model) for parameter in group["params"]} == {
        id(parameter) for parameter in model.head.parameters()
    }


def test_planning_runs_it_without_memory(scenes: Path) -> None:
    plan = plan_training(scene_settings(scenes, segment={"head": "pyramid", "width": 16}), 1)
    forecast = Forecast(STAGE, plan, ClusterSpec(1, 1, 0.5, 1e9))
    assert forecast.flops_per_sample.forward_backward > forecast.flops_per_sample.forward > 0
    assert forecast.memory_estimate.peak > 0
    assert plan.encoder["pooling"] == "token"
    assert TASKS["segmentation"].head_card(plan) == {
        "kind": "segmentation",
        "head": "pyramid",
        "width": 16,
        "classes": 3,
    }


def test_a_plan_says_what_is_measured(scenes: Path) -> None:
    for data, line in (
        ({}, "measured  on whole images, as 24 x 32 pixels, in 6 windows of 16 x 16"),
        ({"eval_size": None}, "measured  on whole images, as 16 x 16 pixels"),
        (
            {"eval_size": 16, "eval_crop_ratio": 0.5},
            "measured  on the middle of images (data.eval_crop_ratio=0.5), as 16 x 16 pixels",
        ),
    ):
        assert plan_training(scene_settings(scenes, data=data), 1).summary_lines()[-1] == line


def pretrained(folder: Path, pooling: str = "token") -> str:
    encoder = build_encoder(TINY, image_size=16, channels=3, pooling=pooling)  # type: ignore[arg-type]
    card = encoder_card(TINY, 16, 3, pooling=pooling)  # type: ignore[arg-type]
    write_export(folder, encoder.state_dict(), Card("pretrain", card, (0.5,) * 3, (0.25,) * 3))
    return str(folder)


def test_a_classifier_of_timm_gives_its_weights_and_not_its_head(scenes: Path, tmp_path: Path) -> None:
    """Even if the classes have the same names."""
    torch.manual_seed(1)
    classifier = build_backbone("test_resnet", 16, 3, num_classes=3)
    card = Card("finetune", backbone_card("test_resnet", 16, 3, 3), (0.5,) * 3, (0.25,) * 3, classes=CLASSES)
    write_export(tmp_path / "export", classifier.state_dict(), card)
    weights = segmenter_from_plan(
        plan_training(scene_settings(scenes, model=None, init=str(tmp_path / "export")), 1)
    ).encoder.state_dict()
    assert weights.keys() == classifier.state_dict().keys() - {"fc.weight", "fc.bias"}
    assert all(value.equal(classifier.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("overrides", "kind", "sentence"),
    [
        (
            {"pooling": "token"},
            ConfigError,
            "pooling is of tasks that read one feature of an image, and task=segmentation does not",
        ),
        (
            {"data": {"eval_size": 12}},
            ConfigError,
            "val_size is 12 x 12 and data.image_size 16 x 16: an evaluated image must",
        ),
        ({"data": {"eval_size": [24, 8]}}, ConfigError, "val_size is 24 x 8"),
        ({"data": {"image_size": 18}}, ConfigError, "image_size=18 is not a whole number of patches of 4 pixels"),
        ({"data": {"samples_per_class": 2}}, DataError, "data.balance and data.fold need one for each"),
        ({"data": {"holdout_per_class": 2}}, DataError, "data.balance and data.fold need one for each"),
        ({"data": {"label_field": "ids.png"}}, DataError, r"reads members \.ids\.png, and its samples have"),
        (
            {"data": {"label_field": "png"}},
            DataError,
            r"sample '000' has no image beside its label \.png .*: correct data",
        ),
        ({"task": "classification", "segment": {"width": 8}}, ConfigError, "segment is for task=segmentation"),
        (
            {"trials": {"arms": {"scratch": None}, "lr_per_256": [1e-3]}},
            ConfigError,
            "trials compares top-1, which task=seg",
        ),
        ({"segment": {"head": "fpn"}}, ConfigError, "segment.head"),
        ({"segment": {"stride": 0.0}}, ConfigError, "segment.stride"),
        (
            {"model": None, "backbone": "mixer_s16_224"},
            ConfigError,
            "'mixer_s16_224' makes no feature map of images of",
        ),
        (
            {"model": None, "backbone": "resnet18", "batch": {"max_micro_size": 1}},
            ConfigError,
            "'resnet18' cannot train segmentation on a microbatch of 1 images of 16 x 16 pixels",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides: dict[str, Any], kind: type, sentence: str, scenes: Path) -> None:
    with pytest.raises(kind, match=sentence):
        plan_training(scene_settings(scenes, **overrides), 1)


def test_an_encoder_without_a_norm_behind_its_tokens_is_refused(scenes: Path, tmp_path: Path) -> None:
    cfg = scene_settings(scenes, model=None, init=pretrained(tmp_path / "export", "avg"))
    with pytest.raises(ExportError, match="was fine-tuned with pooling=avg and has no norm behind its tokens"):
        plan_training(cfg, 1)


def test_classes_without_names_are_refused(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", classes=None)
    with pytest.raises(DataError, match="its classes have no names"):
        plan_training(scene_settings(folder), 1)
