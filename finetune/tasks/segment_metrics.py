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
from foveal.data.image.targets import NO_CLASS
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.segmentation import draw_segmentation_grid
from foveal.models.sliding_window import iter_sliding_window_log_probs
from foveal.training.run import Run

_SHEET_IMAGES = 4  # images on a sheet
_INVALID_METRIC_CHARS = re.compile(r"[^\w. -]")  # what MLflow takes in no name of a number


class ConfusionMatrix:
    """What was met of each class and what was guessed there, as one vector that ranks add up.

    ``sums`` is float64 [K * K + 1]: pixels by class and guess (exact up to 2^53), and the summed loss.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.sums = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=device)

    def update(self, log_probs_KHW: Tensor, targets_HW: Tensor) -> Tensor:
        """Count an image by the logarithms of its probabilities; the guesses [H, W]. Ignored pixels count for nothing."""
        guess_HW, targets_HW = log_probs_KHW.argmax(dim=0), targets_HW.long()
        known_HW = targets_HW != NO_CLASS
        places = (targets_HW * self.num_classes + guess_HW)[known_HW]
        losses_HW = F.nll_loss(log_probs_KHW[None], targets_HW[None], ignore_index=NO_CLASS, reduction="none")
        self.sums[:-1] += torch.bincount(places, minlength=self.num_classes**2)
        self.sums[-1] += losses_HW.double().sum()
        return guess_HW

    def compute(
        self, all_reduce_sum: Callable[[Tensor], Tensor], class_names: Sequence[str], split: str
    ) -> dict[str, float]:
        """``miou``, ``pixels``, ``loss`` and ``iou_<name>``, over all ranks; every rank calls it.

        Raises: DataError, on every rank, where no pixel of any has a label.
        """
        *pixels, loss = all_reduce_sum(self.sums).tolist()
        met = torch.tensor(pixels, dtype=torch.float64).view(self.num_classes, self.num_classes)  # [true, guessed]
        right, union, total = met.diag(), met.sum(dim=0) + met.sum(dim=1) - met.diag(), met.sum()
        if not total:
            raise DataError(
                f"split '{split}' has no labelled pixel to measure by: set data.val to a split that has some"
            )
        each = {
            f"iou_{name}": float(right[number] / union[number])
            for number, name in enumerate(sanitize_metric_names(class_names))
            if union[number]
        }
        mean = sum(each.values()) / len(each)
        return {"miou": mean, "pixels": float(right.sum() / total), "loss": loss / float(total)} | each


def compute_segmentation_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """``miou`` and ``pixels`` (the share of pixels that are right) in [0, 1], ``loss``, and ``iou_<class>``, after a step.

    Of all labelled pixels of the part at data.val_size, every image once, padding nowhere. A class that neither masks nor
    guesses have anywhere has no number and no part in the mean. Every rank calls it; rank 0 shows what it met first of
    data.val. Raises: DataError where no pixel has a label.
    """
    plan, shown = run.plan, []
    assert isinstance(plan, FinetunePlan)
    data, counts = plan.cfg.data, ConfusionMatrix(len(plan.classes), engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None
            images = normalise(batch.images, plan.mean, plan.std)
            seen = iter_sliding_window_log_probs(engine.model, images, data.image_hw, plan.cfg.segment.stride)
            for row, logs_KHW in enumerate(seen):
                if host_batch.valid[row]:
                    guess_HW = counts.update(logs_KHW, batch.targets[row])
                    shown += [(batch.images[row], batch.targets[row], guess_HW)] * (len(shown) < _SHEET_IMAGES)
    if shown and (split, subset) == (data.val, "all"):
        images, truth, guess = (torch.stack(each) for each in zip(*shown, strict=True))
        run.save_image("segmentation", step, lambda: draw_segmentation_grid(images, truth, guess, plan.classes))
    return counts.compute(run.world.all_reduce_sum, plan.classes, split)


def sanitize_metric_names(names: Sequence[str]) -> list[str]:
    """Names that numbers may have; each its own."""
    plain = [_INVALID_METRIC_CHARS.sub("_", name) for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(plain)]
