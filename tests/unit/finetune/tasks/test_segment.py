"""Segmentation as it is planned, learnt and measured: against loops and scikit-learn, and what is refused."""

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
from finetune.tasks.segment_metrics import ConfusionMatrix
from foveal.data import Batch
from foveal.errors import ConfigError, DataError, ExportError
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.vit import VitConfig, build_encoder, encoder_card
from foveal.weights.export import Card, write_export

TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=32, depth=2, heads=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


class Fixed(nn.Module):
    """A model whose logits are what it was given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, _images: Tensor, _drops: Tensor) -> Tensor:
        return self.logits


def batch_of(marks: Tensor) -> Batch:
    rows = torch.arange(len(marks))
    images = torch.zeros(len(marks), 3, *marks.shape[1:], dtype=torch.uint8)
    return Batch(images, rows, rows, rows, rows >= 0, step=0, epoch=0, microbatch_index=0, targets=marks)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 3.0, 0.25)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_labelled_pixels(smoothing: float, weights: tuple[float, ...]) -> None:
    """Against a loop over pixels, gradient included."""
    random = np.random.default_rng(0)
    logits, marks = random.normal(size=(2, 3, 4, 5)), random.integers(-1, 3, (2, 4, 5))
    marks[1, 2] = -1
    objective, batch = (
        SegmentationLoss(0, smoothing, 0, (0.5,) * 3, (0.5,) * 3, torch.tensor(weights)),
        batch_of(torch.tensor(marks, dtype=torch.int16)),
    )
    model = Fixed(torch.tensor(logits, dtype=torch.float32))
    total, numbers = objective(model, batch)
    total.backward()
    loss, right, gradient, known = 0.0, 0.0, np.zeros_like(logits), 0.0
    for row, down, across in zip(*np.nonzero(marks >= 0), strict=True):
        mine, label = logits[row, :, down, across], marks[row, down, across]
        chances = np.exp(mine) / np.exp(mine).sum()
        wanted = np.array(weights) * (np.full(3, smoothing / 3) + np.eye(3)[label] * (1 - smoothing))
        loss -= (wanted * np.log(chances)).sum()
        right += weights[label] * (mine.argmax() == label)
        known += weights[label]
        gradient[row, :, down, across] = chances * wanted.sum() - wanted
    assert float(total.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(objective.batch_weight(batch)) == pytest.approx(known)
    assert float(numbers["train_pixels"]) == pytest.approx(right)
    assert model.logits.grad is not None
    np.testing.assert_allclose(model.logits.grad, gradient, atol=1e-6)


def test_overlap_is_that_of_scikit_learn() -> None:
    """Five classes, of which the masks lack two and masks and guesses one; counted in two parts, as ranks do."""
    random = np.random.default_rng(1)
    marks = random.choice([-1, 0, 1, 3], (4, 6, 7)).astype(np.int16)
    logits = torch.tensor(random.normal(size=(4, 5, 6, 7)), dtype=torch.float32)
    logits[:, 4] = -9.0
    logs = F.log_softmax(logits, dim=1)
    parts = [ConfusionMatrix(5, torch.device("cpu")) for _ in range(2)]
    guesses = [parts[n // 2].update(logs[n], torch.tensor(marks[n])) for n in range(4)]
    found = parts[0].compute(lambda sums: sums + parts[1].sums, ("a", "b (1)", "b [1]", "d", "e"), "val")
    known = marks >= 0
    true, guess = marks[known], torch.stack(guesses).numpy()[known]
    each = np.array(jaccard_score(true, guess, average=None, labels=[0, 1, 2, 3]))  # type: ignore[arg-type]
    assert [found.pop(f"iou_{name}") for name in ("a", "b _1__1", "b _1__2", "d")] == pytest.approx(list(each))
    assert found == {
        "miou": pytest.approx(each.mean()),
        "pixels": pytest.approx(accuracy_score(true, guess)),
        "loss": pytest.approx(float(F.cross_entropy(logits, torch.tensor(marks).long(), ignore_index=-1)), rel=1e-6),
    }


def test_nothing_labelled_is_nothing_to_measure_by() -> None:
    counts = ConfusionMatrix(2, torch.device("cpu"))
    counts.update(torch.zeros(2, 3, 3), torch.full((3, 3), -1))
    with pytest.raises(DataError, match=r"split 'blank' has no labelled pixel to measure by: set data.val to a split"):
        counts.compute(lambda sums: sums, CLASSES[:2], "blank")


def test_the_head_learns_fastest_and_the_seed_decides_the_weights(scenes: Path) -> None:
    for further in ({}, {"segment": {"head": "pyramid", "width": 16}}, {"model": None, "backbone": "test_resnet"}):
        found = plan_training(scene_settings(scenes, **further), 1)
        model = segmenter_from_plan(found)
        scales = {
            id(each): group["lr_scale"] for group in param_groups_from_plan(found, model) for each in group["params"]
        }
        assert all(scales[id(each)] == 1.0 for each in model.head.parameters())
        assert min(scales.values()) < 0.9
        again = segmenter_from_plan(found).state_dict()
        assert all(value.equal(again[name]) for name, value in model.state_dict().items())


def test_of_a_frozen_encoder_only_the_head_learns(scenes: Path) -> None:
    found = plan_training(scene_settings(scenes, frozen=True, drop_path=0.0), 1)
    model = segmenter_from_plan(found).train()
    assert model.head.training
    assert not any(module.training for module in model.encoder.modules())
    learning = {name.partition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert learning == {"head"}
    assert {id(each) for group in param_groups_from_plan(found, model) for each in group["params"]} == {
        id(each) for each in model.head.parameters()
    }


def test_planning_runs_it_without_memory(scenes: Path) -> None:
    found = plan_training(scene_settings(scenes, segment={"head": "pyramid", "width": 16}), 1)
    forecast = Forecast(STAGE, found, ClusterSpec(1, 1, 0.5, 1e9))
    assert forecast.flops_per_sample.forward_backward > forecast.flops_per_sample.forward > 0
    assert forecast.memory_estimate.peak > 0
    assert found.encoder["pooling"] == "token"
    assert TASKS["mask"].head_card(found) == {"kind": "segmentation", "head": "pyramid", "width": 16, "classes": 3}


def test_a_plan_says_what_is_measured(scenes: Path) -> None:
    for data, line in (
        ({}, "measured  on whole images, as 24 x 32 pixels, in 6 windows of 16 x 16"),
        ({"val_size": None}, "measured  on whole images, as 16 x 16 pixels"),
        (
            {"val_size": 16, "crop_ratio": 0.5},
            "measured  on the middle of images (data.crop_ratio=0.5), as 16 x 16 pixels",
        ),
    ):
        assert plan_training(scene_settings(scenes, data=data), 1).summary_lines()[-1] == line


def pretrained(folder: Path, pooling: str = "token") -> str:
    encoder = build_encoder(TINY, image_size=16, channels=3, pooling=pooling)  # type: ignore[arg-type]
    card = encoder_card(TINY, 16, 3, pooling=pooling)  # type: ignore[arg-type]
    write_export(folder, encoder.state_dict(), Card("pretrain", card, (0.5,) * 3, (0.25,) * 3))
    return str(folder)


def test_a_classifier_of_timm_gives_its_weights_and_not_its_head(scenes: Path, tmp_path: Path) -> None:
    """Even where its classes are called the same; and the other way round."""
    torch.manual_seed(1)
    theirs = build_backbone("test_resnet", 16, 3, num_classes=3)
    told = Card("finetune", backbone_card("test_resnet", 16, 3, 3), (0.5,) * 3, (0.25,) * 3, classes=CLASSES)
    write_export(tmp_path / "export", theirs.state_dict(), told)
    ours = segmenter_from_plan(
        plan_training(scene_settings(scenes, model=None, init=str(tmp_path / "export")), 1)
    ).encoder.state_dict()
    assert ours.keys() == theirs.state_dict().keys() - {"fc.weight", "fc.bias"}
    assert all(value.equal(theirs.state_dict()[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("further", "kind", "sentence"),
    [
        (
            {"pooling": "token"},
            ConfigError,
            "pooling=token is of classifiers; with data.labels=mask every patch is read",
        ),
        (
            {"data": {"val_size": 12}},
            ConfigError,
            "val_size is 12 x 12 and data.image_size 16 x 16: an evaluated image must",
        ),
        ({"data": {"val_size": [24, 8]}}, ConfigError, "val_size is 24 x 8"),
        ({"data": {"image_size": 18}}, ConfigError, "image_size=18 is not a whole number of patches of 4 pixels"),
        ({"data": {"per_class": 2}}, DataError, "data.balance and data.fold need one for each"),
        ({"data": {"holdout_per_class": 2}}, DataError, "data.balance and data.fold need one for each"),
        ({"data": {"label_field": "ids.png"}}, DataError, r"reads members \.ids\.png, and its samples have"),
        ({"data": {"labels": "class"}, "segment": {"width": 8}}, ConfigError, "segment is for data.labels=mask"),
        (
            {"trials": {"arms": {"scratch": None}, "lr_per_256": [1e-3]}},
            ConfigError,
            "trials compares top-1, which data.lab",
        ),
        ({"segment": {"head": "fpn"}}, ConfigError, "segment.head"),
        ({"segment": {"stride": 0.0}}, ConfigError, "segment.stride"),
        (
            {"model": None, "backbone": "mixer_s16_224"},
            ConfigError,
            "'mixer_s16_224' makes no feature map of images of",
        ),
        (
            {"model": None, "backbone": "resnet18", "batch": {"at_once": 1}},
            ConfigError,
            "'resnet18' cannot train segmentation on a microbatch of 1 images of 16 x 16 pixels",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(further: dict[str, Any], kind: type, sentence: str, scenes: Path) -> None:
    with pytest.raises(kind, match=sentence):
        plan_training(scene_settings(scenes, **further), 1)


def test_an_encoder_without_a_norm_behind_its_tokens_is_refused(scenes: Path, tmp_path: Path) -> None:
    cfg = scene_settings(scenes, model=None, init=pretrained(tmp_path / "export", "avg"))
    with pytest.raises(ExportError, match="was fine-tuned with pooling=avg and has no norm behind its tokens"):
        plan_training(cfg, 1)


def test_classes_without_names_are_refused(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", classes=None)
    with pytest.raises(DataError, match="its classes have no names"):
        plan_training(scene_settings(folder), 1)
