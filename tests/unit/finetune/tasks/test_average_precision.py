"""COCO's library against the definition in NumPy: average precision at ten overlaps, over 101 points of recall."""

import numpy as np
import pytest

from finetune.tasks.average_precision import IOU_THRESHOLDS, ImageDetections, compute_average_precision

CLASSES, IMAGES = 3, 12


def boxes(draw: np.random.Generator, count: int) -> np.ndarray:
    corners = draw.uniform(0, 60, (count, 2))
    return np.concatenate([corners, corners + draw.uniform(8, 40, (count, 2))], axis=1)


def looked_at(seed: int) -> list[ImageDetections]:
    """Some found well, some badly, some twice, some where nothing is; no box of the last class, and no equal scores."""
    draw, seen = np.random.default_rng(seed), []
    scores = draw.permutation(np.linspace(0.06, 0.99, 40 * IMAGES)).reshape(IMAGES, 40)
    for image in range(IMAGES):
        there = boxes(draw, image % 5)
        labels = draw.integers(0, CLASSES - 1, len(there))
        near = there.repeat(2, axis=0) + draw.normal(0, 3, (2 * len(there), 4))
        found = np.concatenate([near, boxes(draw, 3)])
        kinds = np.concatenate([labels.repeat(2), draw.integers(0, CLASSES, 3)])
        rows = np.concatenate([found, kinds[:, None], scores[image, : len(found), None]], axis=1)
        seen.append(ImageDetections(image + 7, rows, np.concatenate([there, labels[:, None]], axis=1)))
    return seen


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    width, height = np.minimum(one[2:4], other[2:4]) - np.maximum(one[:2], other[:2])
    shared = max(width, 0) * max(height, 0)
    area = [(each[2] - each[0]) * (each[3] - each[1]) for each in (one, other)]
    return shared / (sum(area) - shared)


def by_definition(seen: list[ImageDetections], label: int, threshold: float) -> float:
    """Best first, each takes the box of its image that it overlaps most and that is not taken yet."""
    there = {one.image_id: one.ground_truth[one.ground_truth[:, 4] == label] for one in seen}
    total = sum(len(rows) for rows in there.values())
    if not total:
        return np.nan
    rows = [(row[5], one.image_id, row) for one in seen for row in one.predicted if row[4] == label]
    taken: dict[int, set[int]] = {image: set() for image in there}
    right = []
    for _, image, row in sorted(rows, key=lambda each: -each[0]):
        free = [(overlap(row, box), n) for n, box in enumerate(there[image]) if n not in taken[image]]
        best, number = max(free, default=(0.0, -1))
        right.append(best >= threshold)
        if right[-1]:
            taken[image].add(number)
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / (1 + np.arange(len(hits)))
    points = [precision[recall >= point - 1e-12] for point in np.linspace(0, 1, 101)]
    return float(np.mean([each.max() if len(each) else 0.0 for each in points]))


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_definition(seed: int) -> None:
    seen = looked_at(seed)
    found = compute_average_precision(seen, CLASSES)
    wanted = [[by_definition(seen, label, threshold) for label in range(CLASSES)] for threshold in IOU_THRESHOLDS]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    assert np.isnan(found[:, -1]).all()
    assert 0 < found[0, 0] < 1


def test_nothing_found_nothing_there_and_any_order() -> None:
    seen = looked_at(0)
    blind = [ImageDetections(one.image_id, one.predicted[:0], one.ground_truth) for one in seen]
    assert np.nansum(compute_average_precision(blind, CLASSES)) == 0
    empty = [ImageDetections(one.image_id, one.predicted, one.ground_truth[:0]) for one in seen]
    assert np.isnan(compute_average_precision(empty, CLASSES)).all()
    np.testing.assert_array_equal(
        compute_average_precision(seen[::-1], CLASSES), compute_average_precision(seen, CLASSES)
    )
