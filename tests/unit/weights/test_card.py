"""What a card says of its run: settings under the names of today, how images are read, the task of the head."""

from typing import Any

import pytest

from foveal.weights.card import Card, eval_pixels_from_card, evaluated_metrics, settings_of, task_of

ENCODER = {"name": "vit_tiny_patch16_224", "image_size": [8, 16], "channels": 3, "classes": 0}


def card_of(science: dict[str, Any], **fields: Any) -> Card:
    return Card("finetune", ENCODER | fields.pop("encoder", {}), (0.5,), (0.25,), science=science, **fields)


def test_names_of_0_1_are_those_of_today() -> None:
    old = {"data.crop_ratio": 1.0, "data.val_size": 32, "data.labels": "classes", "average": 0.9}
    new = {"data.eval_crop_ratio": 1.0, "data.eval_size": 32, "task": "multilabel", "ema_decay": 0.9}
    assert settings_of(card_of(old)) == settings_of(card_of(new)) == new
    assert eval_pixels_from_card(card_of(old)) == eval_pixels_from_card(card_of(new))


def test_pixels_are_as_the_run_states_or_as_without_settings() -> None:
    pixels = eval_pixels_from_card(card_of({}))
    assert (pixels.image_hw, pixels.eval_hw) == ((8, 16), (8, 16))
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.25,) * 3), "one value for all channels"
    assert (pixels.crop_ratio, pixels.interpolation, pixels.jpeg_scaling) == (0.875, "bicubic", True)
    assert (pixels.decode_version, pixels.bit_depth) == (1, None)
    stated = {
        "data.eval_size": [32, 64],
        "data.decode_version": 2,
        "inherited.bit_depth": 12,
        "data.jpeg_scaling": False,
    }
    pixels = eval_pixels_from_card(card_of(stated))
    assert (pixels.eval_hw, pixels.decode_version, pixels.bit_depth, pixels.jpeg_scaling) == ((32, 64), 2, 12, False)


@pytest.mark.parametrize(
    ("card", "task"),
    [
        (card_of({}), None),
        (card_of({"task": "classification"}), None),
        (card_of({}, encoder={"classes": 3}), "classification"),
        (card_of({"data.labels": "classes"}, encoder={"classes": 3}), "multilabel"),
        (card_of({"task": "segmentation"}, head={"kind": "segmentation"}), "segmentation"),
    ],
)
def test_the_task_is_the_heads(card: Card, task: str | None) -> None:
    assert task_of(card) == task


def test_metrics_of_training_images_are_no_evaluation() -> None:
    metrics = {"loss": 1.0, "train_top1": 0.9, "val_top1": 0.8, "holdout_loss": 0.7, "fold_top1": 0.6, "lr": 0.1}
    assert list(evaluated_metrics(card_of({}, metrics=metrics))) == ["val_top1", "holdout_loss", "fold_top1"]


def test_one_of_several_students_has_its_own_metrics() -> None:
    metrics = {"val_loss": 1.0, "val_small/knn_top1": 0.5, "val_small.2/knn_top1": 0.7, "small/loss": 0.1}
    card = card_of({}, metrics=metrics)
    assert list(evaluated_metrics(card, "small")) == ["val_loss", "val_small/knn_top1"]
    assert len(evaluated_metrics(card)) == 3
