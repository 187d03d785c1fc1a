"""What the metrics of a detector hide: the average precision of every class, and the worst images. K classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.evaluation_details import Facts, warn_of_failure
from finetune.task import FinetunePlan
from finetune.tasks.average_precision import IOU_THRESHOLDS, ImageDetections
from foveal.data.sample_images import read_images_by_id
from foveal.inspect.boxes import draw_box_grid
from foveal.inspect.picture import Picture
from foveal.training.run import Run

MIN_DRAWN_SCORE = 0.3
_NUM_WORST = 4
_MIN_IOU = 0.5  # of a detection that counts as right


@dataclass(frozen=True)
class _ImageScore:
    """An image with the numbers of its right, false and missed boxes."""

    image: ImageDetections
    right: int
    false: int
    missed: int

    @property
    def f1(self) -> float:
        """F1 of the confident detections at an IoU of 0.5."""
        return 2 * self.right / max(1, 2 * self.right + self.false + self.missed)


@dataclass(frozen=True)
class DetectionDetails:
    """All images of an evaluation, the same on every rank, and average precision [10, K] by IoU and class."""

    split: str
    classes: Sequence[str]
    images: Sequence[ImageDetections]
    average_precision: np.ndarray

    def collect(self, run: Run, step: int) -> Callable[[], Facts]:
        """Return a function that describes the evaluation and draws the worst images; nothing is to gather."""
        return lambda: self._describe_and_draw(run, step)

    def _describe_and_draw(self, run: Run, step: int) -> Facts:
        scores = [_score_image(image) for image in self.images]
        wrong = [score for score in scores if score.false + score.missed]
        worst = sorted(wrong, key=lambda score: (score.f1, -score.missed - score.false, score.image.image_id))
        worst = worst[:_NUM_WORST]
        if worst and not run.is_part:
            with warn_of_failure("the picture 'mistakes'"):
                picture = self._draw(run, step, worst)
                run.save_picture("mistakes", step, lambda: picture)
        labels = np.concatenate([np.zeros(0), *(image.ground_truth[:, 4] for image in self.images)]).astype(int)
        support = np.bincount(labels, minlength=len(self.classes)).tolist()
        return {
            "unit": "boxes",
            "num_images": len(self.images),
            "per_class": [
                {
                    "class": name,
                    "support": support[number],
                    "ap": float(self.average_precision[:, number].mean()),
                    "ap_50": float(self.average_precision[IOU_THRESHOLDS.index(0.5), number]),
                }
                for number, name in enumerate(self.classes)
            ],
            "mistakes": [
                {
                    "id": score.image.image_id,
                    "f1": score.f1,
                    "right": score.right,
                    "false": score.false,
                    "missed": score.missed,
                }
                for score in worst
            ],
        }

    def _draw(self, run: Run, step: int, worst: Sequence[_ImageScore]) -> Picture:
        plan = run.plan
        assert isinstance(plan, FinetunePlan)
        by_id = {score.image.image_id: score for score in worst}
        label_field = None if plan.label_reader is None else plan.label_reader.field
        batch = read_images_by_id(plan.dataset, plan.cfg.data, self.split, list(by_id), label_field)
        shown = [by_id[sample_id] for sample_id in batch.ids.tolist()]
        missed, false = sum(score.missed for score in shown), sum(score.false for score in shown)
        title = (
            f"After step {step}: the {len(shown)} worst images, by F1 of boxes from a score of "
            f"{100 * MIN_DRAWN_SCORE:.0f} % up at an IoU of {100 * _MIN_IOU:.0f} %; {missed} objects are missed, "
            f"{false} boxes are false"
        )
        true_boxes = [score.image.ground_truth for score in shown]
        predicted = [_confident(score.image) for score in shown]
        sheet = draw_box_grid(batch.images, true_boxes, predicted, self.classes, title=title)
        return Picture(sheet, "Worst images", f"{title}. Rows: images. Columns: ground truth, predicted boxes.")


def _confident(image: ImageDetections) -> np.ndarray:
    return image.predicted[image.predicted[:, 5] >= MIN_DRAWN_SCORE]


def _score_image(image: ImageDetections) -> _ImageScore:
    """Match confident detections, best first, with the true box of their class of largest IoU that is still free."""
    predicted, true = _confident(image), image.ground_truth
    ious = _box_ious(predicted, true)
    ious[predicted[:, 4:5] != true[None, :, 4]] = 0.0
    right = 0
    for row in np.argsort(-predicted[:, 5], kind="stable"):
        if len(true) and ious[row].max() >= _MIN_IOU:
            right += 1
            ious[:, ious[row].argmax()] = 0.0
    return _ImageScore(image, right, len(predicted) - right, len(true) - right)


def _box_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU [N, M] of boxes whose first columns are left, top, right, bottom."""
    left_top = np.maximum(first[:, None, :2], second[None, :, :2])
    right_bottom = np.minimum(first[:, None, 2:4], second[None, :, 2:4])
    overlap = np.prod(np.clip(right_bottom - left_top, 0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:4] - boxes[:, :2], 0, None), axis=1) for boxes in (first, second)]
    return overlap / np.maximum(areas[0][:, None] + areas[1][None] - overlap, 1e-9)
