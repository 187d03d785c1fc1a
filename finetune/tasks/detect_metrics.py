"""How well boxes are found: mean average precision as COCO has it, exact on any number of ranks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from finetune.plan import FinetunePlan
from finetune.tasks.average_precision import IOU_THRESHOLDS, ImageDetections, compute_average_precision
from finetune.tasks.segment_metrics import sanitize_metric_names
from foveal.data import Batch, normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.boxes import draw_box_grid
from foveal.models.fcos import Detections, compute_fcos_losses, decode_detections
from foveal.training.run import Run

# Of an image: what scores less changes no average precision that is any good, and COCO looks at a hundred.
_DETECTION_LIMITS = {"score_threshold": 0.05, "iou_threshold": 0.6, "max_candidates": 1000, "max_detections": 100}
_SHEET_IMAGES = 8  # images on a sheet
_MIN_DRAWN_SCORE = 0.3  # the lowest score that is drawn


def compute_detection_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """``map`` (the mean over IoU from 0.5 to 0.95), ``map_50`` and ``map_75``, in [0, 1], and ``loss`` after a step.

    With ``detect.each_class`` also ``ap_<name>``, the part in ``map`` of each class.
    Boxes are compared in pixels of the evaluated image (``data.val_size``, else ``data.image_size``). Every image counts
    once, padding nowhere; classes of which no box is there do not count. Every rank calls it; rank 0 compares.
    """
    plan = run.plan
    assert isinstance(plan, FinetunePlan)
    sums, seen = torch.zeros(2, dtype=torch.float64, device=engine.device), []
    with engine.eval_mode():
        for number, host_batch in enumerate(run.evaluation_batches(step, split=split, subset=subset)):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None, "data.labels=boxes reads them"
            answers = engine.model(normalise(batch.images, plan.mean, plan.std))
            lost_B = torch.stack(compute_fcos_losses(answers, batch.targets)).sum(dim=0)
            sums += torch.stack([(lost_B * batch.valid).sum(), batch.valid.sum()]).double()
            rows = _pair_with_targets(
                batch, decode_detections(answers, plan.cfg.data.eval_image_hw, **_DETECTION_LIMITS)
            )
            if number == 0 and rows and (split, subset) == (plan.cfg.data.val, "all"):
                run.save_image("boxes", step, partial(_draw_box_sheet, host_batch, rows, plan.classes))
            seen += rows
    lost, images = run.world.all_reduce_sum(sums).tolist()
    table = [one for rank in run.world.all_gather_objects(seen) for one in rank]
    found_TK = torch.from_numpy(run.world.on_rank0(lambda: compute_average_precision(table, len(plan.classes))))
    told = {
        "map": found_TK,
        "map_50": found_TK[IOU_THRESHOLDS.index(0.5)],
        "map_75": found_TK[IOU_THRESHOLDS.index(0.75)],
    }
    if plan.cfg.detect.each_class:
        told |= {f"ap_{name}": found_TK[:, k] for k, name in enumerate(sanitize_metric_names(plan.classes))}
    if found_TK.isnan().all():
        raise DataError(f"split '{split}' has no box to measure by: set data.val to a split that has some")
    numbers = {name: each.nanmean().item() for name, each in told.items() if not each.isnan().all()}
    return numbers | {"loss": lost / max(images, 1.0)}  # every sample may be bad, where data.max_bad says so


def _pair_with_targets(batch: Batch, detections: Sequence[Detections]) -> list[ImageDetections]:
    """The images of a batch that are no padding."""
    assert batch.targets is not None
    rows = []
    for image, valid, marks, one in zip(
        batch.ids.tolist(), batch.valid.tolist(), batch.targets.cpu(), detections, strict=True
    ):
        if valid:
            table = torch.cat([one.boxes, one.classes[:, None].float(), one.scores[:, None]], dim=1)
            rows.append(ImageDetections(image, table.cpu().numpy(), marks[marks[:, 4] >= 0].numpy()))
    return rows


def _draw_box_sheet(batch: Batch, images: Sequence[ImageDetections], classes: Sequence[str]) -> Any:
    """The first images of a batch with what is there and what was found for sure."""
    shown = images[:_SHEET_IMAGES]
    found = [one.predicted[one.predicted[:, 5] >= _MIN_DRAWN_SCORE] for one in shown]
    return draw_box_grid(batch.images[batch.valid][:_SHEET_IMAGES], [one.ground_truth for one in shown], found, classes)
