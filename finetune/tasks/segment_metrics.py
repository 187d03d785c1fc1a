"""Mean intersection over union, pixel accuracy and loss over a whole part of the data, exact on any number of ranks.

H x W pixels of an image, K classes.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.plan import FinetunePlan
from foveal.data import normalise
from foveal.data.image.targets import NOTHING
from foveal.data.sampling.subset import PartName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.segmentation import overlay_sheet
from foveal.models.sliding_window import by_windows
from foveal.training.run import Run

_SHOWN = 4  # images on a sheet
_UNNAMEABLE = re.compile(r"[^\w. -]")  # what MLflow takes in no name of a number


class Counts:
    """What was met of each class and what was guessed there, as one vector that ranks add up.

    ``sums`` is float64 [K * K + 1]: pixels by class and guess (exact up to 2^53), and the summed loss.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.sums = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)

    def add(self, logs_KHW: Tensor, marks_HW: Tensor) -> Tensor:
        """Count an image by the logarithms of its probabilities; the guesses [H, W]. Ignored pixels count for nothing."""
        guess_HW, marks_HW = logs_KHW.argmax(dim=0), marks_HW.long()
        known_HW = marks_HW != NOTHING
        places = (marks_HW * self.classes + guess_HW)[known_HW]
        losses_HW = F.nll_loss(logs_KHW[None], marks_HW[None], ignore_index=NOTHING, reduction="none")
        self.sums[:-1] += torch.bincount(places, minlength=self.classes**2)
        self.sums[-1] += losses_HW.double().sum()
        return guess_HW

    def numbers(self, sum_over_ranks: Callable[[Tensor], Tensor], names: Sequence[str], split: str) -> dict[str, float]:
        """``miou``, ``pixels``, ``loss`` and ``iou_<name>``, over all ranks; every rank calls it.

        Errors: DataError, on every rank, where no pixel of any has a label.
        """
        *pixels, loss = sum_over_ranks(self.sums).tolist()
        met = torch.tensor(pixels, dtype=torch.float64).view(self.classes, self.classes)  # [true, guessed]
        right, union, total = met.diag(), met.sum(dim=0) + met.sum(dim=1) - met.diag(), met.sum()
        if not total:
            raise DataError(
                f"split '{split}' has no labelled pixel to measure by: set data.val to a split that has some"
            )
        each = {
            f"iou_{name}": float(right[number] / union[number])
            for number, name in enumerate(nameable(names))
            if union[number]
        }
        mean = sum(each.values()) / len(each)
        return {"miou": mean, "pixels": float(right.sum() / total), "loss": loss / float(total)} | each


def overlap(engine: Engine, run: Run, step: int, *, split: str, part: PartName) -> dict[str, float]:
    """``miou`` and ``pixels`` (the share of pixels that are right) in [0, 1], ``loss``, and ``iou_<class>``, after a step.

    Of all labelled pixels of the part at data.val_size, every image once, padding nowhere. A class that neither masks nor
    guesses have anywhere has no number and no part in the mean. Every rank calls it; rank 0 shows what it met first of
    data.val. Errors: DataError where no pixel has a label.
    """
    plan, shown = run.plan, []
    assert isinstance(plan, FinetunePlan)
    data, counts = plan.cfg.data, Counts(len(plan.classes), engine.device)
    with engine.looking():
        for host_batch in run.evaluation(step, split=split, part=part):
            batch = host_batch.to(engine.device)
            assert batch.marks is not None
            images = normalise(batch.images, plan.mean, plan.std)
            seen = by_windows(engine.model, images, data.sides, plan.cfg.segment.stride)
            for row, logs_KHW in enumerate(seen):
                if host_batch.valid[row]:
                    guess_HW = counts.add(logs_KHW, batch.marks[row])
                    shown += [(batch.images[row], batch.marks[row], guess_HW)] * (len(shown) < _SHOWN)
    if shown and (split, part) == (data.val, "all"):
        images, truth, guess = (torch.stack(each) for each in zip(*shown, strict=True))
        run.picture("segmentation", step, lambda: overlay_sheet(images, truth, guess, plan.classes))
    return counts.numbers(run.world.sum, plan.classes, split)


def nameable(names: Sequence[str]) -> list[str]:
    """Names that numbers may have; each its own."""
    plain = [_UNNAMEABLE.sub("_", name) for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(plain)]
