"""Metrics of detectors: COCO's mean average precision, exact on any number of ranks."""

from collections.abc import Sequence
from functools import partial

import torch

from finetune.task import FinetunePlan
from finetune.tasks.average_precision import IOU_THRESHOLDS, ImageDetections, ap_by_threshold_and_class
from finetune.tasks.detect_details import MIN_DRAWN_SCORE, DetectionDetails
from finetune.tasks.segment_metrics import sanitize_metric_names
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.boxes import draw_box_grid
from foveal.inspect.picture import Picture
from foveal.models.fcos import Detections, decode_detections, fcos_losses_per_image
from foveal.training.run import Run

# Per image. Detections with lower scores do not change a useful average precision, and COCO counts at most 100.
DETECTION_LIMITS = {"score_threshold": 0.05, "iou_threshold": 0.6, "max_candidates": 1000, "max_detections": 100}
_SHEET_IMAGES = 8


def compute_detection_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """Return the metrics of ``compute_detection_metrics_and_details``."""
    return compute_detection_metrics_and_details(engine, run, step, split=split, subset=subset)[0]


def compute_detection_metrics_and_details(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> tuple[dict[str, float], DetectionDetails]:
    """Return ``mAP`` (mean over IoU 0.5 to 0.95), ``mAP_50``, ``mAP_75``, in [0, 1], and ``loss`` after a step.

    With ``detect.each_class`` also ``ap_<name>``, the average precision of each class over the same IoU thresholds.
    Boxes are in pixels of the evaluated image (``data.eval_size``, else ``data.image_size``). Each image counts once;
    padding and classes without boxes are excluded. Every rank must call it; rank 0 computes the average precision.
    Raises: DataError if no image has a box.
    """
    plan = run.plan
    assert isinstance(plan, FinetunePlan)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    local_detections: list[ImageDetections] = []
    with engine.eval_mode():
        for number, host_batch in enumerate(run.evaluation_batches(step, split=split, subset=subset)):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None, "task=detection reads targets"
            output = engine.model(normalise(batch.images, plan.mean, plan.std))
            losses_B = torch.stack(fcos_losses_per_image(output, batch.targets)).sum(dim=0)
            sums += torch.stack([(losses_B * batch.valid).sum(), batch.valid.sum()]).double()
            detections = _pair_with_targets(
                batch, decode_detections(output, plan.cfg.data.eval_image_hw, **DETECTION_LIMITS)
            )
            if number == 0 and detections and (split, subset) == (plan.cfg.data.val, "all"):
                title = (
                    f"After step {step} of {plan.total_steps}: images of {split}; predicted boxes from a score of "
                    f"{100 * MIN_DRAWN_SCORE:.0f} % up"
                )
                run.save_picture("boxes", step, partial(_draw_box_sheet, host_batch, detections, plan.classes, title))
            local_detections += detections
    loss, images = run.world.all_reduce_sum(sums).tolist()
    gathered = run.world.all_gather_objects(local_detections)
    all_detections = [image for rank_detections in gathered for image in rank_detections]
    ap_TK = torch.from_numpy(run.world.on_rank0(lambda: ap_by_threshold_and_class(all_detections, len(plan.classes))))
    precisions = {
        "mAP": ap_TK,
        "mAP_50": ap_TK[IOU_THRESHOLDS.index(0.5)],
        "mAP_75": ap_TK[IOU_THRESHOLDS.index(0.75)],
    }
    if plan.cfg.detect.each_class:
        precisions |= {f"ap_{name}": ap_TK[:, k] for k, name in enumerate(sanitize_metric_names(plan.classes))}
    if ap_TK.isnan().all():
        raise DataError(f"split '{split}' has no box to measure by: set data.val to a split that has some")
    metrics = {name: ap.nanmean().item() for name, ap in precisions.items() if not ap.isnan().all()}
    metrics |= {"loss": loss / max(images, 1.0)}  # data.max_bad_fraction may allow that no sample decodes
    return metrics, DetectionDetails(split, plan.classes, all_detections, ap_TK.numpy())


def _pair_with_targets(batch: Batch, detections: Sequence[Detections]) -> list[ImageDetections]:
    """Return predicted and true boxes of the batch's images without padding."""
    assert batch.targets is not None
    pairs = []
    for image, valid, targets, predicted in zip(
        batch.ids.tolist(), batch.valid.tolist(), batch.targets.cpu(), detections, strict=True
    ):
        if valid:
            rows = torch.cat([predicted.boxes, predicted.classes[:, None].float(), predicted.scores[:, None]], dim=1)
            pairs.append(ImageDetections(image, rows.cpu().numpy(), targets[targets[:, 4] >= 0].numpy()))
    return pairs


def _draw_box_sheet(batch: Batch, detections: Sequence[ImageDetections], classes: Sequence[str], title: str) -> Picture:
    """Draw true boxes and confident predictions on the first images of a batch."""
    drawn = detections[:_SHEET_IMAGES]
    predicted = [image.predicted[image.predicted[:, 5] >= MIN_DRAWN_SCORE] for image in drawn]
    true_boxes = [image.ground_truth for image in drawn]
    images = batch.images[batch.valid][:_SHEET_IMAGES]
    sheet = draw_box_grid(images, true_boxes, predicted, classes, title=title)
    return Picture(sheet, "Detections", f"{title}. Rows: images. Columns: ground truth, predicted boxes.")
