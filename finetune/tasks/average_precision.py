"""COCO's average precision (Lin et al., "Microsoft COCO: Common Objects in Context", 2014), by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from foveal.errors import ConfigError

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * number, 2) for number in range(10))


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """Predicted boxes, float [N, 6], and true boxes, float [M, 5], of an image; ``image_id`` is its sample id.

    Columns: left, top, right, bottom in pixels, class, and for predictions the score.
    """

    image_id: int
    predicted: np.ndarray
    ground_truth: np.ndarray


def check_pycocotools() -> None:
    """Raise ConfigError if pycocotools is not installed."""
    if find_spec("pycocotools") is None:
        raise ConfigError(
            "task=detection measures with pycocotools, which is not installed: pip install 'foveal[detection]'"
        )


def ap_by_threshold_and_class(detections: Sequence[ImageDetections], num_classes: int) -> np.ndarray:
    """Return the average precision [10, K] by ``IOU_THRESHOLDS`` and class; NaN for a class without true boxes.

    The order of the images does not matter: equal scores rank by sample id. At most 100 boxes per image and class
    count.
    """
    from pycocotools.cocoeval import COCOeval

    ordered = sorted(detections, key=lambda image: image.image_id)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        true_boxes = _to_coco([(image.image_id, image.ground_truth) for image in ordered], num_classes)
        predicted = _to_coco([(image.image_id, image.predicted) for image in ordered], num_classes)
        evaluation = COCOeval(true_boxes, predicted, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # [IoU thresholds, recall points, classes, area ranges, maximum detections]: all areas, 100 detections
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    return np.where(precision < 0, np.nan, precision).mean(axis=1)


def _to_coco(rows: Sequence[tuple[int, np.ndarray]], num_classes: int) -> Any:
    """Return COCO's tables of boxes by image id. Annotation ids start at 1: COCOeval takes id 0 for no match."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image_id, boxes in rows:
        for left, top, right, bottom, label, *score in boxes.astype(np.float64).tolist():
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "iscrowd": 0,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "score": score[0] if score else 1.0,
                }
            )
    coco: Any = COCO()
    images = [{"id": image_id} for image_id, _ in rows]
    categories = [{"id": label} for label in range(num_classes)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco
