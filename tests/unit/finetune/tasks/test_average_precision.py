"""pycocotools against the definition in NumPy: average precision at 10 IoU thresholds over 101 recall points."""

import numpy as np
import pytest

from finetune.tasks.average_precision import IOU_THRESHOLDS, ImageDetections, ap_by_threshold_and_class

CLASSES, IMAGES = 3, 12


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(8, 40, (count, 2))], axis=1)


def make_detections(seed: int) -> list[ImageDetections]:
    """Return accurate, poor, duplicate and false detections; no true box of the last class, no equal scores."""
    rng, images = np.random.default_rng(seed), []
    scores = rng.permutation(np.linspace(0.06, 0.99, 40 * IMAGES)).reshape(IMAGES, 40)
    for image in range(IMAGES):
        true_boxes = random_boxes(rng, image % 5)
        labels = rng.integers(0, CLASSES - 1, len(true_boxes))
        perturbed = true_boxes.repeat(2, axis=0) + rng.normal(0, 3, (2 * len(true_boxes), 4))
        predicted = np.concatenate([perturbed, random_boxes(rng, 3)])
        predicted_labels = np.concatenate([labels.repeat(2), rng.integers(0, CLASSES, 3)])
        rows = np.concatenate([predicted, predicted_labels[:, None], scores[image, : len(predicted), None]], axis=1)
        images.append(ImageDetections(image + 7, rows, np.concatenate([true_boxes, labels[:, None]], axis=1)))
    return images


def iou(first: np.ndarray, second: np.ndarray) -> float:
    width, height = np.minimum(first[2:4], second[2:4]) - np.maximum(first[:2], second[:2])
    intersection = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return intersection / (sum(areas) - intersection)


def reference_average_precision(detections: list[ImageDetections], label: int, threshold: float) -> float:
    """Match detections by descending score, each to the unmatched true box of its image with the highest IoU."""
    true_boxes = {
        image_detections.image_id: image_detections.ground_truth[image_detections.ground_truth[:, 4] == label]
        for image_detections in detections
    }
    total = sum(len(rows) for rows in true_boxes.values())
    if not total:
        return np.nan
    rows = [
        (row[5], image_detections.image_id, row)
        for image_detections in detections
        for row in image_detections.predicted
        if row[4] == label
    ]
    matched: dict[int, set[int]] = {image: set() for image in true_boxes}
    correct = []
    for _, image, row in sorted(rows, key=lambda candidate: -candidate[0]):
        free = [(iou(row, box), index) for index, box in enumerate(true_boxes[image]) if index not in matched[image]]
        best, number = max(free, default=(0.0, -1))
        correct.append(best >= threshold)
        if correct[-1]:
            matched[image].add(number)
    hits = np.cumsum(correct)
    recall, precision = hits / total, hits / (1 + np.arange(len(hits)))
    points = [precision[recall >= point - 1e-12] for point in np.linspace(0, 1, 101)]
    return float(np.mean([candidate.max() if len(candidate) else 0.0 for candidate in points]))


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_definition(seed: int) -> None:
    detections = make_detections(seed)
    precision = ap_by_threshold_and_class(detections, CLASSES)
    expected = [
        [reference_average_precision(detections, label, threshold) for label in range(CLASSES)]
        for threshold in IOU_THRESHOLDS
    ]
    np.testing.assert_allclose(precision, expected, atol=1e-9)
    assert np.isnan(precision[:, -1]).all()
    assert 0 < precision[0, 0] < 1


def test_nothing_found_nothing_there_and_any_order() -> None:
    detections = make_detections(0)
    without_predictions = [
        ImageDetections(image_detections.image_id, image_detections.predicted[:0], image_detections.ground_truth)
        for image_detections in detections
    ]
    assert np.nansum(ap_by_threshold_and_class(without_predictions, CLASSES)) == 0
    without_boxes = [
        ImageDetections(image_detections.image_id, image_detections.predicted, image_detections.ground_truth[:0])
        for image_detections in detections
    ]
    assert np.isnan(ap_by_threshold_and_class(without_boxes, CLASSES)).all()
    np.testing.assert_array_equal(
        ap_by_threshold_and_class(detections[::-1], CLASSES), ap_by_threshold_and_class(detections, CLASSES)
    )
