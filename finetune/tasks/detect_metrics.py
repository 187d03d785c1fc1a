"""How well boxes are found: mean average precision as COCO has it, exact on any number of ranks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from finetune.plan import FinetunePlan
from finetune.tasks.average_precision import THRESHOLDS, Seen, average_precisions
from finetune.tasks.segment_metrics import nameable
from foveal.data import Batch, normalise
from foveal.data.sampling.subset import PartName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.boxes import box_sheet
from foveal.models.fcos import Found, found, losses
from foveal.training.run import Run

# Of an image: what scores less changes no average precision that is any good, and COCO looks at a hundred.
_KEPT = {"lowest": 0.05, "overlap": 0.6, "candidates": 1000, "most": 100}
_SHOWN = 8  # images on a sheet
_SURE = 0.3  # the lowest score that is drawn


def average_precision(engine: Engine, run: Run, step: int, *, split: str, part: PartName) -> dict[str, float]:
    """``map`` (the mean over IoU from 0.5 to 0.95), ``map_50`` and ``map_75``, in [0, 1], and ``loss`` after a step.

    With ``detect.each_class`` also ``ap_<name>``, the part in ``map`` of each class.
    Boxes are compared in pixels of the evaluated image (``data.val_size``, else ``data.image_size``). Every image counts
    once, padding nowhere; classes of which no box is there do not count. Every rank calls it; rank 0 compares.
    """
    plan = run.plan
    assert isinstance(plan, FinetunePlan)
    sums, seen = torch.zeros(2, dtype=torch.float64, device=engine.device), []
    with engine.looking():
        for number, host_batch in enumerate(run.evaluation(step, split=split, part=part)):
            batch = host_batch.to(engine.device)
            assert batch.marks is not None, "data.labels=boxes reads them"
            answers = engine.model(normalise(batch.images, plan.mean, plan.std))
            lost_B = torch.stack(losses(answers, batch.marks)).sum(dim=0)
            sums += torch.stack([(lost_B * batch.valid).sum(), batch.valid.sum()]).double()
            rows = _seen(batch, found(answers, plan.cfg.data.val_sides, **_KEPT))
            if number == 0 and rows and (split, part) == (plan.cfg.data.val, "all"):
                run.picture("boxes", step, partial(_sheet, host_batch, rows, plan.classes))
            seen += rows
    lost, images = run.world.sum(sums).tolist()
    table = [one for rank in run.world.gather(seen) for one in rank]
    found_TK = torch.from_numpy(run.world.once(lambda: average_precisions(table, len(plan.classes))))
    told = {"map": found_TK, "map_50": found_TK[THRESHOLDS.index(0.5)], "map_75": found_TK[THRESHOLDS.index(0.75)]}
    if plan.cfg.detect.each_class:
        told |= {f"ap_{name}": found_TK[:, k] for k, name in enumerate(nameable(plan.classes))}
    if found_TK.isnan().all():
        raise DataError(f"split '{split}' has no box to measure by: set data.val to a split that has some")
    numbers = {name: each.nanmean().item() for name, each in told.items() if not each.isnan().all()}
    return numbers | {"loss": lost / max(images, 1.0)}  # every sample may be bad, where data.max_bad says so


def _seen(batch: Batch, each: Sequence[Found]) -> list[Seen]:
    """The images of a batch that are no padding."""
    assert batch.marks is not None
    rows = []
    for image, valid, marks, one in zip(batch.ids.tolist(), batch.valid.tolist(), batch.marks.cpu(), each, strict=True):
        if valid:
            table = torch.cat([one.boxes, one.classes[:, None].float(), one.scores[:, None]], dim=1)
            rows.append(Seen(image, table.cpu().numpy(), marks[marks[:, 4] >= 0].numpy()))
    return rows


def _sheet(batch: Batch, seen: Sequence[Seen], classes: Sequence[str]) -> Any:
    """The first images of a batch with what is there and what was found for sure."""
    shown = seen[:_SHOWN]
    found = [one.found[one.found[:, 5] >= _SURE] for one in shown]
    return box_sheet(batch.images[batch.valid][:_SHOWN], [one.there for one in shown], found, classes)
