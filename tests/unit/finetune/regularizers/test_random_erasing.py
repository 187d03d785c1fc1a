"""Random erasing against timm's: areas, shapes and places of the boxes, the noise in them, and the rule of 0.1."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from finetune.config import FinetuneConfig
from finetune.regularizers.random_erasing import apply_random_erasing

COUNT, SEED = 2000, 3
KEYS = torch.arange(COUNT)
SIZES = [(32, 32), (24, 40)]


def boxes_of(erased: Tensor) -> np.ndarray:
    """Height, width, top and left of the box in each image that has one, int [M, 4]."""
    masks = erased[:, 0][erased.flatten(1).any(dim=1)].numpy()
    rows, columns = masks.any(axis=2), masks.any(axis=1)
    heights, widths = rows.sum(axis=1), columns.sum(axis=1)
    tops, lefts = rows.argmax(axis=1), columns.argmax(axis=1)
    places = zip(masks, heights, widths, tops, lefts, strict=True)
    assert all(mask[y : y + h, x : x + w].all() and mask.sum() == h * w for mask, h, w, y, x in places), "it is one box"
    return np.stack([heights, widths, tops, lefts], axis=1)


def ours(size: tuple[int, int], probability: float = 1.0, boxes: Any = "inside") -> np.ndarray:
    return boxes_of(apply_random_erasing(torch.zeros(COUNT, 1, *size), KEYS, SEED, probability, boxes) != 0)


def timms(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The boxes of timm as MAE's fine-tuning calls it, from another generator."""
    images = torch.zeros(COUNT, 1, *size)
    monkeypatch.setattr("timm.data.random_erasing.random", random.Random(0))
    return boxes_of(RandomErasing(1.0, mode="pixel", max_count=1, device="cpu")(images) != 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_are_distributed_as_timms(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = ours(size), timms(size, monkeypatch)
    # How many of all images have a box: those whose ten shapes all exceed the image have none.
    assert abs(len(found) - len(expected)) <= 4 * np.sqrt(COUNT / 2)
    free = np.array(size) - found[:, :2]
    assert (found[:, 2:] <= free).all(), "a box exceeds its image"
    statistics = {
        "area": lambda box: box[:, 0] * box[:, 1] / np.prod(size),
        "height": lambda box: box[:, 0],
        "width": lambda box: box[:, 1],
        "aspect": lambda box: np.log(box[:, 0] / box[:, 1]),
        "top": lambda box: box[:, 2],
        "left": lambda box: box[:, 3],
        "bottom": lambda box: size[0] - box[:, 0] - box[:, 2],
        "right": lambda box: size[1] - box[:, 1] - box[:, 3],
    }
    for name, statistic in statistics.items():
        one, other = statistic(found), statistic(expected)
        # Means of two samples differ by more than four standard errors once in 16,000 comparisons.
        error = np.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error, name
        result: Any = stats.ks_2samp(one, other)
        assert result.pvalue > 1e-4, name
    areas = statistics["area"](found)
    # Zhong et al.: areas are uniform in [0.02, 1/3] before shapes that exceed the image are drawn again.
    assert 0.165 < areas.mean() < 0.18
    assert areas.max() < 1 / 3 + 0.03
    assert len(np.unique(found[:, 2])) > size[0] // 2


def test_the_rule_of_0_1_cuts_boxes_at_the_edges() -> None:
    """The numbers that 0.1.0 made of these keys."""
    found = ours((32, 32), boxes="clipped")
    assert found[:3].tolist() == [[7, 6, 0, 20], [10, 6, 10, 8], [6, 7, 14, 13]]
    areas = found[:, 0] * found[:, 1] / 32**2
    assert areas.mean() == pytest.approx(0.136, abs=0.005)
    assert FinetuneConfig.model_fields["random_erasing_boxes"].json_schema_extra["neutral"] == "clipped"  # type: ignore[index]


@pytest.mark.parametrize("boxes", ["inside", "clipped"])
def test_as_many_images_as_it_should_have_a_box_of_noise_on_any_split_of_a_step(boxes: Any) -> None:
    images = torch.zeros(COUNT, 1, 16, 16)
    erased = apply_random_erasing(images, KEYS, SEED, 0.25, boxes)
    fraction = (erased != 0).flatten(1).any(dim=1).float().mean().item()
    assert fraction == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / COUNT))
    noise = apply_random_erasing(images, KEYS, SEED, 1.0, boxes)
    noise = noise[noise != 0]
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    part = apply_random_erasing(images[5:9], KEYS[5:9], SEED, 0.25, boxes)
    assert torch.equal(part, erased[5:9])


def test_channels_have_noise_of_their_own() -> None:
    erased = apply_random_erasing(torch.zeros(50, 3, 16, 16), KEYS[:50], SEED, 1.0, "inside")
    mask = (erased != 0).all(dim=1)
    assert torch.equal(mask, (erased != 0).any(dim=1)), "a box is the same in all channels"
    correlation = np.corrcoef(erased[:, 0][mask], erased[:, 1][mask])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(int(mask.sum()))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 64)], ids=str)
def test_small_images_have_small_boxes_or_none(size: tuple[int, int]) -> None:
    images = torch.zeros(200, 1, *size)
    erased = apply_random_erasing(images, KEYS[:200], SEED, 1.0, "inside") != 0
    assert not erased.flatten(1).all(dim=1).any()
