"""Average precision as COCO has it (Lin et al., "Microsoft COCO: Common Objects in Context", 2014), by its own library."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from foveal.errors import ConfigError

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * number, 2) for number in range(10))  # of intersection over union


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """An image that was looked at: its sample id, what was found, float [N, 6], and what is there, float [M, 5].

    Rows are left, top, right, bottom in pixels, the class, and, of what was found, the score.
    """

    image_id: int
    predicted: np.ndarray
    ground_truth: np.ndarray


def check_pycocotools() -> None:
    """Raises: ConfigError where COCO's library is not installed."""
    if find_spec("pycocotools") is None:
        raise ConfigError(
            "data.labels=boxes measures with pycocotools, which is not installed: pip install 'foveal[detection]'"
        )


def compute_average_precision(detections: Sequence[ImageDetections], num_classes: int) -> np.ndarray:
    """The average precision [10, K] at each of ``THRESHOLDS`` of each of K classes; not a number where no box is of one.

    The order of the images does not matter: equal scores count in the order of sample ids. Of an image and class, the
    hundred best count.
    """
    from pycocotools.cocoeval import COCOeval

    ordered = sorted(detections, key=lambda one: one.image_id)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        there = _to_coco([(one.image_id, one.ground_truth) for one in ordered], num_classes)
        found = _to_coco([(one.image_id, one.predicted) for one in ordered], num_classes)
        measured = COCOeval(there, found, "bbox")
        measured.evaluate()
        measured.accumulate()
    # [thresholds, points of recall, classes, sizes of objects, most boxes of an image]: all sizes, and a hundred boxes
    precision = np.asarray(measured.eval["precision"])[:, :, :, 0, -1]
    return np.where(precision < 0, np.nan, precision).mean(axis=1)


def _to_coco(rows: Sequence[tuple[int, np.ndarray]], classes: int) -> Any:
    """COCO's tables of boxes: left, top, width, height, and numbers that begin with 1, since it takes 0 for nothing."""
    from pycocotools.coco import COCO

    boxes: list[dict[str, Any]] = []
    for image, table in rows:
        for left, top, right, bottom, label, *score in table.astype(np.float64).tolist():
            width, height = right - left, bottom - top
            one = {"id": len(boxes) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0}
            boxes.append(one | {"bbox": [left, top, width, height], "area": width * height, "score": (*score, 1.0)[0]})
    tables: Any = COCO()
    images, kinds = (
        [{"id": number} for number in numbers] for numbers in ([image for image, _ in rows], range(classes))
    )
    tables.dataset = {"images": images, "categories": kinds, "annotations": boxes}
    tables.createIndex()
    return tables
