"""What the metrics of a classifier hide, in integers that add up over ranks. B images, K classes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune.evaluation_details import (
    MAX_MATRIX_CLASSES,
    Facts,
    WorstRows,
    describe_confusion,
    divide,
    recall_and_precision,
)
from finetune.tasks.classify_metrics import UNLABELLED, predict_classes
from foveal.data.batch import Batch
from foveal.training.run import Run

_NUM_BINS = 10  # of confidence
_CONFIDENCE_UNIT = 1 << 20  # of a confidence as an integer, so that sums are exact


class ClassificationDetails:
    """Confusion matrix, calibration and worst mistakes of a classifier, of the images that have a label.

    ``_sums``: int64 counts by true and predicted class [K * K] (of more than 2,000 classes: support, predictions and
    correct ones by class [3 * K]), then by bin of confidence the images, the correct ones, and the sum of confidences.
    """

    def __init__(self, classes: Sequence[str], device: torch.device) -> None:
        self._classes, num_classes = classes, len(classes)
        self._has_matrix = num_classes <= MAX_MATRIX_CLASSES
        self._num_counts = num_classes**2 if self._has_matrix else 3 * num_classes
        self._sums = torch.zeros(self._num_counts + 3 * _NUM_BINS, dtype=torch.int64, device=device)
        self._worst = WorstRows(6, device)  # loss, id, true class, predicted class, probability of each

    @torch.no_grad()
    def update(self, logits_BK: Tensor, batch: Batch) -> None:
        """Add a batch. Reads nothing from the device."""
        num_classes = len(self._classes)
        labelled_B = batch.valid & (batch.labels != UNLABELLED)
        labels_B, predicted_B = batch.labels.clamp(min=0), predict_classes(logits_BK)[:, 0]
        correct_B = labels_B == predicted_B
        log_probs_BK = logits_BK.float().log_softmax(dim=1)
        losses_B = -log_probs_BK.gather(1, labels_B[:, None])[:, 0]
        confidences_B = log_probs_BK.gather(1, predicted_B[:, None])[:, 0].exp()
        if self._has_matrix:
            self._count(0, labels_B * num_classes + predicted_B, labelled_B)
        else:
            for number, (cells_B, counted_B) in enumerate(
                ((labels_B, labelled_B), (predicted_B, labelled_B), (labels_B, labelled_B & correct_B))
            ):
                self._count(number * num_classes, cells_B, counted_B)
        finite_B = confidences_B.nan_to_num(nan=0.0)
        bins_B = (finite_B * _NUM_BINS).long().clamp(0, _NUM_BINS - 1)
        units_B = (finite_B * _CONFIDENCE_UNIT).round().long()
        for number, values_B in enumerate((labelled_B, labelled_B & correct_B, units_B * labelled_B)):
            self._count(self._num_counts + number * _NUM_BINS, bins_B, values_B)
        is_mistake_B = labelled_B & ~correct_B
        self._worst.update(losses_B, batch.ids, is_mistake_B, labels_B, predicted_B, confidences_B, (-losses_B).exp())

    def _count(self, start: int, cells_B: Tensor, values_B: Tensor) -> None:
        self._sums.index_add_(0, start + cells_B, values_B.long())

    def collect(self, run: Run, step: int) -> Callable[[], Facts]:
        """Gather over ranks; return a function that describes the whole (see ``EvaluationDetails``)."""
        sums, worst = run.world.all_reduce_sum(self._sums), self._worst.gather(run)
        return lambda: self._describe(sums.cpu(), worst)

    def _describe(self, sums: Tensor, worst: Sequence[Sequence[float]]) -> Facts:
        num_classes, classes = len(self._classes), self._classes
        counts, bins = sums[: self._num_counts], sums[self._num_counts :].view(3, _NUM_BINS)
        if self._has_matrix:
            matrix_KK = counts.view(num_classes, num_classes)
            support_K, predicted_K, correct_K = matrix_KK.sum(dim=1), matrix_KK.sum(dim=0), matrix_KK.diag()
        else:
            matrix_KK = None
            support_K, predicted_K, correct_K = counts.view(3, num_classes)
        rows = recall_and_precision(correct_K, support_K, predicted_K)
        facts: Facts = {
            "unit": "images",
            "num_images": int(support_K.sum()),
            "num_correct": int(correct_K.sum()),
            "per_class": [
                {"class": name, "support": support} | row
                for name, support, row in zip(classes, support_K.tolist(), rows, strict=True)
            ],
            "calibration": _describe_calibration(bins),
            "mistakes": [self._describe_mistake(*row) for row in worst],
        }
        return facts if matrix_KK is None else facts | describe_confusion(matrix_KK, classes)

    def _describe_mistake(
        self, loss: float, sample_id: float, label: float, predicted: float, confidence: float, probability: float
    ) -> Facts:
        true_name, predicted_name = self._classes[int(label)], self._classes[int(predicted)]
        return {
            "id": int(sample_id),
            "loss": loss,
            "class": true_name,
            "predicted": predicted_name,
            "probability": confidence,
            "class_probability": probability,
            "caption": [true_name, f"taken for {predicted_name}", f"{100 * confidence:.1f} %, loss {loss:.3g}"],
        }


def _describe_calibration(bins: Tensor) -> Facts:
    """Return accuracy and mean confidence by bin, and the expected calibration error (Guo et al., 2017)."""
    rows = [
        {"count": count, "accuracy": divide(correct, count), "confidence": divide(units / _CONFIDENCE_UNIT, count)}
        for count, correct, units in bins.T.tolist()
    ]
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"]]
    return {"bins": rows, "expected_error": divide(sum(gaps), sum(row["count"] for row in rows))}
