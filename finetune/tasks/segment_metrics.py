"""Metrics of segmenters: mean IoU, pixel accuracy and loss on a data subset, exact on any number of ranks.

H x W pixels of an image, K classes.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.task import FinetunePlan
from finetune.tasks.segment_details import SegmentationDetails
from foveal.data.image.targets import NO_CLASS
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.picture import Picture
from foveal.inspect.segmentation import draw_segmentation_grid
from foveal.models.sliding_window import iter_sliding_window_log_probs
from foveal.training.run import Run

_SHEET_IMAGES = 4
_INVALID_METRIC_CHARS = re.compile(r"[^\w. -]")  # characters that MLflow rejects in metric names


class ConfusionMatrixAndLoss:
    """Confusion matrix of pixels and summed loss, as one vector that is summed over ranks.

    ``sums`` is float64 [K * K + 1]: pixels by true and predicted class (exact up to 2^53), and the summed loss.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.sums = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=device)
        self.total_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # of all ranks, which compute sets

    def update(self, log_probs_KHW: Tensor, targets_HW: Tensor) -> Tensor:
        """Add the labelled pixels of an image with these log-probabilities; return its predictions [H, W]."""
        predictions_HW, targets_HW = log_probs_KHW.argmax(dim=0), targets_HW.long()
        labelled_HW = targets_HW != NO_CLASS
        cells = (targets_HW * self.num_classes + predictions_HW)[labelled_HW]
        losses_HW = F.nll_loss(log_probs_KHW[None], targets_HW[None], ignore_index=NO_CLASS, reduction="none")
        self.sums[:-1] += torch.bincount(cells, minlength=self.num_classes**2)
        self.sums[-1] += losses_HW.double().sum()
        return predictions_HW

    def compute(
        self, all_reduce_sum: Callable[[Tensor], Tensor], class_names: Sequence[str], split: str
    ) -> dict[str, float]:
        """Return ``miou``, ``pixel_accuracy``, ``loss`` and ``iou_<name>`` over all ranks. Every rank must call it.

        Raises: DataError, on every rank, if no pixel on any rank has a label.
        """
        *counts, loss = all_reduce_sum(self.sums).tolist()
        matrix = torch.tensor(counts, dtype=torch.float64).view(self.num_classes, self.num_classes)  # [true, predicted]
        self.total_KK = matrix.long()
        correct = matrix.diag()
        union = matrix.sum(dim=0) + matrix.sum(dim=1) - correct
        total = matrix.sum()
        if not total:
            raise DataError(
                f"split '{split}' has no labelled pixel to measure by: set data.val to a split that has some"
            )
        ious = {
            f"iou_{name}": float(correct[index] / union[index])
            for index, name in enumerate(sanitize_metric_names(class_names))
            if union[index]
        }
        mean_iou = sum(ious.values()) / len(ious)
        return {"miou": mean_iou, "pixel_accuracy": float(correct.sum() / total), "loss": loss / float(total)} | ious


def compute_segmentation_metrics(
    engine: Engine,
    run: Run,
    step: int,
    *,
    split: str,
    subset: SubsetName,
    details: SegmentationDetails | None = None,
) -> dict[str, float]:
    """Return ``miou``, ``pixel_accuracy`` (pixel accuracy) and ``iou_<class>`` in [0, 1], and ``loss``, after a step.

    All labelled pixels at data.eval_size count; each image counts once, padding is excluded. Classes that are neither in
    the masks nor predicted have no IoU and are not in the mean. Every rank must call it; rank 0 draws its first images
    of data.val. ``details`` gets all images. Raises: DataError if no pixel has a label.
    """
    plan, drawn = run.plan, []
    assert isinstance(plan, FinetunePlan)
    data, confusion = plan.cfg.data, ConfusionMatrixAndLoss(len(plan.classes), engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None
            images = normalise(batch.images, plan.mean, plan.std)
            log_probs = iter_sliding_window_log_probs(engine.model, images, data.image_hw, plan.cfg.segment.stride)
            for row, log_probs_KHW in enumerate(log_probs):
                if host_batch.valid[row]:
                    predictions_HW = confusion.update(log_probs_KHW, batch.targets[row])
                    if details is not None:
                        details.update(
                            int(host_batch.ids[row]), host_batch.images[row], batch.targets[row], predictions_HW
                        )
                    if len(drawn) < _SHEET_IMAGES:
                        drawn.append((batch.images[row], batch.targets[row], predictions_HW))
    if drawn and (split, subset) == (data.val, "all"):
        images, truth, predictions = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
        title = f"After step {step} of {plan.total_steps}: images of {split}"
        run.save_picture(
            "segmentation",
            step,
            lambda: Picture(
                draw_segmentation_grid(images, truth, predictions, plan.classes, title=title),
                "Segmentations",
                f"{title}. Rows: images. Columns: image, ground truth, prediction.",
            ),
        )
    metrics = confusion.compute(run.world.all_reduce_sum, plan.classes, split)
    if details is not None:
        details.matrix_KK = confusion.total_KK
    return metrics


def sanitize_metric_names(names: Sequence[str]) -> list[str]:
    """Replace characters that MLflow rejects; names that become equal get their index appended."""
    sanitized = [_INVALID_METRIC_CHARS.sub("_", name) for name in names]
    return [name if sanitized.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(sanitized)]
