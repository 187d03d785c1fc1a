"""What the metrics of a segmenter hide: pixels by class, and its worst images. H x W pixels, K classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.evaluation_details import Facts, describe_confusion, divide, recall_and_precision, warn_of_failure
from foveal.data.image.targets import NO_CLASS
from foveal.inspect.picture import Picture
from foveal.inspect.segmentation import draw_segmentation_grid
from foveal.training.run import Run

_NUM_WORST = 4


@dataclass(frozen=True)
class _WorstImage:
    """An image, uint8 [C, H, W], with its mask and its prediction, int16 [H, W], and its mean IoU."""

    iou: float
    sample_id: int
    image: np.ndarray
    mask: np.ndarray
    prediction: np.ndarray

    @property
    def rank_key(self) -> tuple[float, int]:
        return self.iou, self.sample_id


class SegmentationDetails:
    """Pixels by true and predicted class, and the images of lowest IoU.

    ``matrix_KK``: int64 [K, K] over all ranks, [true, predicted]; the metrics set it.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self.matrix_KK = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        self._num_images = 0
        self._worst: list[_WorstImage] = []

    def update(self, sample_id: int, image: Tensor, mask_HW: Tensor, prediction_HW: Tensor) -> None:
        """Consider an image, uint8 [C, H, W]."""
        self._num_images += 1
        iou = _mean_iou(mask_HW.long(), prediction_HW, len(self._classes))
        is_full = len(self._worst) == _NUM_WORST
        if np.isnan(iou) or (is_full and (iou, sample_id) > self._worst[-1].rank_key):
            return
        pixels = image.cpu().numpy().copy()  # the loader reuses the memory of its batches
        mask, prediction = (values.to(torch.int16, copy=True).cpu().numpy() for values in (mask_HW, prediction_HW))
        self._worst.append(_WorstImage(iou, sample_id, pixels, mask, prediction))
        self._worst = sorted(self._worst, key=lambda worst: worst.rank_key)[:_NUM_WORST]

    def collect(self, run: Run, step: int) -> Callable[[], Facts]:
        """Gather over ranks; return a function that describes the whole and draws the worst images."""
        own = {image.rank_key: image for image in self._worst}
        gathered = run.world.all_gather_objects((self._num_images, list(own)))
        num_images = sum(number for number, _ in gathered)
        chosen = sorted(key for _, keys in gathered for key in keys)[:_NUM_WORST]
        # Pixels travel of the chosen images only.
        of_ranks = run.world.all_gather_objects([own[key] for key in chosen if key in own])
        worst = sorted((image for images in of_ranks for image in images), key=lambda image: image.rank_key)
        return lambda: self._describe_and_draw(run, step, num_images, worst)

    def _describe_and_draw(self, run: Run, step: int, num_images: int, worst: Sequence[_WorstImage]) -> Facts:
        if worst and not run.is_part:
            with warn_of_failure("the picture 'mistakes'"):
                picture = self._draw(worst, step)
                run.save_picture("mistakes", step, lambda: picture)
        matrix_KK, classes = self.matrix_KK, self._classes
        correct_K, support_K, predicted_K = matrix_KK.diag(), matrix_KK.sum(dim=1), matrix_KK.sum(dim=0)
        union_K = support_K + predicted_K - correct_K
        rows = recall_and_precision(correct_K, support_K, predicted_K)
        return {
            "unit": "pixels",
            "num_images": num_images,
            "per_class": [
                {"class": name, "support": support, "iou": divide(correct, union)} | row
                for name, support, correct, union, row in zip(
                    classes, support_K.tolist(), correct_K.tolist(), union_K.tolist(), rows, strict=True
                )
            ],
            **describe_confusion(matrix_KK, classes),
            "mistakes": [{"id": image.sample_id, "iou": image.iou} for image in worst],
        }

    def _draw(self, worst: Sequence[_WorstImage], step: int) -> Picture:
        images, masks, predictions = (
            torch.from_numpy(np.stack([getattr(image, name) for image in worst]))
            for name in ("image", "mask", "prediction")
        )
        ious = ", ".join(f"{100 * image.iou:.1f} %" for image in worst)
        title = f"After step {step}: the {len(worst)} images of lowest mean IoU of their classes ({ious})"
        return Picture(
            draw_segmentation_grid(images, masks, predictions, self._classes, title=title),
            "Worst images",
            f"{title}. Rows: images. Columns: image, ground truth, prediction.",
        )


def _mean_iou(mask_HW: Tensor, prediction_HW: Tensor, num_classes: int) -> float:
    """Return the mean IoU of an image over the classes in its mask; NaN without any."""
    labelled_HW = mask_HW != NO_CLASS
    mask, prediction = mask_HW[labelled_HW], prediction_HW[labelled_HW]
    true_K, predicted_K, correct_K = (
        torch.bincount(labels, minlength=num_classes) for labels in (mask, prediction, mask[mask == prediction])
    )
    iou_K = correct_K.double() / (true_K + predicted_K - correct_K)
    return float(iou_K[true_K > 0].mean())
