"""What an evaluation finds beside its metrics: against scikit-learn, and the same on any number of ranks."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support
from thread_ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F

from finetune import evaluation_details
from finetune.evaluation_details import MAX_EXCERPT_CLASSES, NUM_MISTAKES, describe_confusion, replace_nonfinite
from finetune.tasks import classify_details
from finetune.tasks.average_precision import ImageDetections
from finetune.tasks.classify_details import ClassificationDetails
from finetune.tasks.detect_details import DetectionDetails
from finetune.tasks.multilabel_details import MultiLabelDetails
from finetune.tasks.segment_details import SegmentationDetails
from foveal.data.batch import Batch
from foveal.training.run import Run

CLASSES = ("cat", "<b>dog", "mäuse", "never")
IMAGES, SIZE = 90, 8  # images, and of a batch


def make_batches() -> list[tuple[Tensor, Batch]]:
    """Logits and batches: some images without a label, and a last batch with padding.

    Images of an even id have the same logits, which are wrong of two classes by the same loss, and of a third they are right.
    """
    random = np.random.default_rng(0)
    batches = []
    for first in range(0, IMAGES, SIZE):
        ids = torch.arange(first, first + SIZE)
        valid = ids < IMAGES
        labels = torch.from_numpy(random.integers(-1, 3, SIZE)).masked_fill(~valid, -1)
        logits = torch.from_numpy(random.integers(-2, 3, (SIZE, 4))).float()
        logits[:, 3] = -9
        logits[::2] = torch.tensor([3.0, 0.0, 0.0, -9.0])
        blank = torch.zeros(SIZE, 1, 2, 2, dtype=torch.uint8)
        batch = Batch(blank, labels, ids.masked_fill(~valid, -1), ids, valid, step=0, epoch=0, microbatch_index=0)
        batches.append((logits, batch))
    return batches


def describe_on(size: int, batches: Sequence[tuple[Tensor, Batch]], classes: Sequence[str] = CLASSES) -> list[Any]:
    """The facts of these batches dealt to ``size`` ranks, by rank."""

    def evaluate(world: Any) -> Any:
        details = ClassificationDetails(classes, torch.device("cpu"))
        for logits, batch in batches[world.rank :: size]:
            details.update(logits, batch)
        return details.collect(cast(Run, SimpleNamespace(world=world)), 5)()

    return run_ranks(size, evaluate)


def labelled(batches: Sequence[tuple[Tensor, Batch]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and ids of the images that count."""
    logits = torch.cat([logits for logits, _ in batches])
    labels, ids = (torch.cat([getattr(batch, name) for _, batch in batches]) for name in ("labels", "ids"))
    keep = labels >= 0
    return logits[keep], labels[keep], ids[keep]


def test_counts_of_classes_are_those_of_scikit_learn() -> None:
    batches = make_batches()
    (facts,) = describe_on(1, batches)
    logits, labels, _ = labelled(batches)
    predicted = logits.topk(4, dim=1).indices[:, 0]
    assert facts["confusion"] == confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert facts["num_images"] == len(labels)
    assert facts["num_correct"] == int((predicted == labels).sum())
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=range(4), zero_division=cast(Any, np.nan)
    )
    assert [row["class"] for row in facts["per_class"]] == list(CLASSES)
    for name, expected in (("precision", precision), ("recall", recall), ("support", support)):
        assert [row[name] for row in facts["per_class"]] == pytest.approx(list(cast(Any, expected)), nan_ok=True)
    (most, *_) = facts["most_confused"]
    mistakes = confusion_matrix(labels, predicted) - np.diag(np.diag(confusion_matrix(labels, predicted)))
    assert most["count"] == mistakes.max()


def test_the_facts_are_the_same_on_any_number_of_ranks() -> None:
    batches = make_batches()
    (alone,) = describe_on(1, batches)
    for size in (2, 3, 16):  # more ranks than batches, too
        for of_rank in describe_on(size, batches):
            assert replace_nonfinite(of_rank) == replace_nonfinite(alone)


def test_the_worst_mistakes_are_those_of_highest_loss_and_then_of_lowest_id() -> None:
    batches = make_batches()
    (facts,) = describe_on(1, batches)
    logits, labels, ids = labelled(batches)
    losses = F.cross_entropy(logits, labels, reduction="none").tolist()
    wrong = (logits.topk(4, dim=1).indices[:, 0] != labels).tolist()
    rows = sorted(
        (-loss, sample) for loss, sample, is_wrong in zip(losses, ids.tolist(), wrong, strict=True) if is_wrong
    )
    assert len(rows) > NUM_MISTAKES
    assert rows[NUM_MISTAKES - 1][0] == rows[NUM_MISTAKES][0], "losses tie where the worst end"
    assert [row["id"] for row in facts["mistakes"]] == [sample for _, sample in rows[:NUM_MISTAKES]]
    first = facts["mistakes"][0]
    assert first["loss"] == pytest.approx(-math.log(first["class_probability"]), rel=1e-5)
    assert first["caption"][:2] == [first["class"], f"taken for {first['predicted']}"]


def test_what_is_right_is_no_mistake() -> None:
    batches = make_batches()[:1]
    logits, batch = batches[0]
    batch.labels.copy_(logits.topk(4, dim=1).indices[:, 0])
    assert describe_on(1, batches)[0]["mistakes"] == []
    batch.labels[5] = 3
    assert [row["id"] for row in describe_on(1, batches)[0]["mistakes"]] == [5]


def test_calibration_is_that_of_a_loop() -> None:
    batches = make_batches()
    (facts,) = describe_on(1, batches)
    logits, labels, _ = labelled(batches)
    confidences, _ = logits.softmax(dim=1).max(dim=1)
    error = 0.0
    for number, row in enumerate(facts["calibration"]["bins"]):
        inside = (confidences >= number / 10) & (confidences < (number + 1) / 10)
        assert row["count"] == int(inside.sum())
        if row["count"]:
            right = (logits.topk(4, dim=1).indices[:, 0] == labels)[inside].double().mean().item()
            assert (row["accuracy"], row["confidence"]) == pytest.approx((right, confidences[inside].mean().item()))
            error += row["count"] * abs(right - confidences[inside].mean().item())
    assert facts["calibration"]["expected_error"] == pytest.approx(error / len(labels))


def test_many_classes_keep_their_counts_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches()
    (with_matrix,) = describe_on(1, batches)
    monkeypatch.setattr(classify_details, "MAX_MATRIX_CLASSES", 3)
    (alone,), (first, second) = describe_on(1, batches), describe_on(2, batches)
    assert replace_nonfinite(alone) == replace_nonfinite(first) == replace_nonfinite(second)
    assert "confusion" not in alone
    assert replace_nonfinite(alone["per_class"]) == replace_nonfinite(with_matrix["per_class"])


def test_numbers_that_are_not_finite_are_null_and_the_worst() -> None:
    batches = make_batches()
    batches[0][0][2] = math.nan
    batches[0][1].labels[2] = 0  # NaN predicts class 0 or another; whatever it is, nothing raises
    (facts,) = describe_on(1, batches)
    written = replace_nonfinite(facts)
    assert "NaN" not in str(written) and "inf" not in str(written["mistakes"][0]["loss"])
    assert written["per_class"][3] == {"class": "never", "support": 0, "recall": None, "precision": None}


def test_an_evaluation_without_labels_describes_nothing() -> None:
    batches = make_batches()
    for _, batch in batches:
        batch.labels.fill_(-1)
    (facts,) = describe_on(1, batches)
    assert (facts["num_images"], facts["mistakes"], facts["most_confused"]) == (0, [], [])


def test_of_a_large_matrix_the_most_confused_classes_are_kept() -> None:
    matrix = torch.eye(1000, dtype=torch.int64) * 50
    matrix[7, 990], matrix[500, 3] = 9, 12
    facts = describe_confusion(matrix, [f"n{number}" for number in range(1000)])
    assert facts["confusion"] is None
    assert [(row["class"], row["predicted"], row["count"]) for row in facts["most_confused"]] == [
        ("n500", "n3", 12),
        ("n7", "n990", 9),
    ]
    assert facts["confusion_excerpt"]["classes"] == ["n3", "n7", "n500", "n990"]
    assert facts["confusion_excerpt"]["support"] == [50, 59, 62, 50]
    dense = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (300, 300)))
    excerpt = describe_confusion(dense, [str(number) for number in range(300)])["confusion_excerpt"]
    assert len(excerpt["classes"]) <= MAX_EXCERPT_CLASSES
    assert np.shape(excerpt["counts"]) == (len(excerpt["classes"]),) * 2


def test_a_failure_to_draw_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with evaluation_details.warn_of_failure("the picture"):
        raise ValueError("two\nlines")
    assert "the picture is not written: two lines" in caplog.text


# --- other tasks ---


def segment_on(size: int) -> list[Any]:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (9, 3, 4, 6)).astype(np.uint8)
    masks, predictions = random.integers(-1, 3, (9, 4, 6)), random.integers(0, 3, (9, 4, 6))
    masks[3] = -1  # an image without labels is no worst image
    predictions[6] = (masks[6] + 1) % 3
    pictures: list[str] = []

    def evaluate(world: Any) -> Any:
        details = SegmentationDetails(CLASSES[:3])
        for number in range(world.rank, 9, size):
            details.update(number, *(torch.from_numpy(values[number]) for values in (images, masks, predictions)))

        def save_picture(name: str, step: int, render: Any) -> None:
            pictures.append(f"{name} {step}: {render().description}")

        run = SimpleNamespace(world=world, is_part=False, save_picture=save_picture)
        details.matrix_KK = torch.tensor([[5, 1, 0], [0, 4, 0], [0, 0, 0]])
        return details.collect(cast(Run, run), 5)()

    facts = run_ranks(size, evaluate)
    assert len(set(pictures)) == 1
    return facts


def test_the_worst_segmentations_are_the_same_on_any_number_of_ranks() -> None:
    (alone,) = segment_on(1)
    assert alone["num_images"] == 9
    assert alone["mistakes"][0] == {"id": 6, "iou": 0.0}
    assert all(replace_nonfinite(facts) == replace_nonfinite(alone) for facts in segment_on(3))
    assert [(row["support"], row["iou"]) for row in alone["per_class"][:2]] == [(6, 5 / 6), (4, 4 / 5)]
    assert math.isnan(alone["per_class"][2]["iou"])


def test_the_worst_images_outlive_their_batch() -> None:
    """The loader fills the memory of a batch again."""
    details = SegmentationDetails(CLASSES[:3])
    image, mask = torch.full((1, 2, 2), 7, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.int16)
    details.update(0, image, mask, torch.zeros(2, 2, dtype=torch.int64))
    image.zero_()
    mask.zero_()
    (worst,) = details._worst
    assert (worst.image == 7).all()
    assert (worst.mask == 1).all()


def test_detections_are_matched_once_and_the_worst_image_is_the_one_with_most_errors() -> None:
    box, far = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    images = [
        ImageDetections(4, np.array([[*box, 0, 0.9], [*box, 0, 0.8]]), np.array([[*box, 0]])),  # one right, one false
        ImageDetections(2, np.array([[*box, 1, 0.9], [*far, 0, 0.1]]), np.array([[*box, 0], [*far, 0]])),
        ImageDetections(9, np.array([[*box, 0, 0.9]]), np.array([[*box, 0]])),  # all right
        ImageDetections(1, np.zeros((0, 6)), np.zeros((0, 5))),
    ]
    ap = np.full((10, 2), 0.25)
    ap[:, 1] = np.nan
    run = cast(Run, SimpleNamespace(is_part=True))
    facts = DetectionDetails("val", ("car", "bus"), images, ap).collect(run, 5)()
    assert [{name: row[name] for name in ("id", "right", "false", "missed")} for row in facts["mistakes"]] == [
        {"id": 2, "right": 0, "false": 1, "missed": 2},
        {"id": 4, "right": 1, "false": 1, "missed": 0},
    ]
    assert replace_nonfinite(facts["per_class"]) == [
        {"class": "car", "support": 4, "ap": 0.25, "ap_50": 0.25},
        {"class": "bus", "support": 0, "ap": None, "ap_50": None},
    ]


def test_several_labels_have_results_by_class_and_mistakes() -> None:
    random = np.random.default_rng(0)
    truth, logits = random.integers(0, 2, (30, 3)).astype(np.float32), random.normal(size=(30, 3)).astype(np.float32)
    truth[:, 2] = 0
    order = random.permutation(30)
    run = cast(Run, None)
    facts = MultiLabelDetails("abc", np.arange(30), logits, truth).collect(run, 5)()
    shuffled = MultiLabelDetails("abc", order, logits[order], truth[order]).collect(run, 5)()
    assert replace_nonfinite(facts) == replace_nonfinite(shuffled), "the order in which ranks bring images matters"
    for number, row in enumerate(facts["per_class"][:2]):
        assert row["average_precision"] == pytest.approx(average_precision_score(truth[:, number], logits[:, number]))
    assert replace_nonfinite(facts["per_class"][2])["average_precision"] is None
    losses_BK = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(truth), reduction="none")
    losses = losses_BK.mean(dim=1)
    (first, *_) = facts["mistakes"]
    assert (first["id"], first["loss"]) == (int(losses.argmax()), pytest.approx(float(losses.max()), rel=1e-5))
    assert set(first["missed"]) <= set(first["classes"])
