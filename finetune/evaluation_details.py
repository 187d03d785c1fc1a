"""What the metrics of an evaluation hide: results of every class, the confusion matrix, the worst mistakes.

The facts are JSON: a picture is drawn from them at the end of a run, also of an evaluation of an earlier attempt.
K classes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal.training.run import Run

Facts = dict[str, Any]  # values of JSON; NaN becomes null when they are written

MAX_MATRIX_CLASSES = 2_000  # int64 counts of so many classes are 32 MB; of more, no matrix is counted
MAX_WRITTEN_CLASSES = 200  # of a confusion matrix in evaluation.json
MAX_EXCERPT_CLASSES = 40  # of the part of a larger matrix that is drawn
NUM_MISTAKES = 12
_NUM_PAIRS = 20
_log = logging.getLogger("foveal.finetune")


class EvaluationDetails(Protocol):
    """What an evaluation collected on this rank beside its metrics."""

    def collect(self, run: Run, step: int) -> Callable[[], Facts]:
        """Gather over ranks, a collective; return a function that describes the whole, which rank 0 calls.

        The facts are the same on any number of ranks. Keys: ``num_images``; ``unit``, what is counted; ``per_class``, a
        row per class, its first number after ``support`` the one that ranks classes; what the task has of
        ``confusion``, ``calibration`` and ``mistakes``, rows with ``id`` and the lines of a ``caption``.
        """
        ...


def describe_confusion(matrix_KK: Tensor, classes: Sequence[str]) -> Facts:
    """Return the facts of a confusion matrix of integers [true, predicted].

    ``confusion``: the matrix, null of more than 200 classes. ``confusion_excerpt``: of more than 40 classes the rows and
    columns of the classes that are confused most. ``most_confused``: pairs of classes, most counts first.
    """
    pairs = _most_confused_pairs(matrix_KK)
    rows = matrix_KK.sum(dim=1)
    facts: Facts = {
        "confusion": matrix_KK.tolist() if len(classes) <= MAX_WRITTEN_CLASSES else None,
        "most_confused": [
            {
                "class": classes[true],
                "predicted": classes[predicted],
                "count": int(matrix_KK[true, predicted]),
                "support": int(rows[true]),
            }
            for true, predicted in pairs[:_NUM_PAIRS]
        ],
    }
    if len(classes) > MAX_EXCERPT_CLASSES:
        chosen = _classes_of(pairs)
        counts = matrix_KK[chosen][:, chosen]
        facts["confusion_excerpt"] = {
            "classes": [classes[index] for index in chosen],
            "counts": counts.tolist(),
            "support": rows[chosen].tolist(),
        }
    return facts


def _most_confused_pairs(matrix_KK: Tensor) -> list[tuple[int, int]]:
    """Return (true, predicted) of the pairs of different classes that occur, most counts first, then by class."""
    mistakes = matrix_KK.clone().fill_diagonal_(0).flatten()
    num_pairs = min(int((mistakes > 0).sum()), MAX_EXCERPT_CLASSES)
    order = mistakes.argsort(descending=True, stable=True)[:num_pairs]
    return [divmod(cell, len(matrix_KK)) for cell in order.tolist()]


def _classes_of(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the classes of the first pairs, at most 40, in ascending order."""
    chosen = set[int]()
    for pair in pairs:
        if len(chosen | set(pair)) <= MAX_EXCERPT_CLASSES:
            chosen |= set(pair)
    return sorted(chosen)


def recall_and_precision(correct_K: Tensor, support_K: Tensor, predicted_K: Tensor) -> list[dict[str, float]]:
    """Return recall and precision of every class from its integer counts; NaN where nothing is to divide by."""
    return [
        {"recall": divide(correct, support), "precision": divide(correct, predicted)}
        for correct, support, predicted in zip(
            correct_K.tolist(), support_K.tolist(), predicted_K.tolist(), strict=True
        )
    ]


def divide(numerator: float, denominator: float) -> float:
    """Return a quotient; NaN if the denominator is 0."""
    return numerator / denominator if denominator else math.nan


def replace_nonfinite(value: Any) -> Any:
    """Return a value of JSON with null in place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: replace_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def warn_of_failure(what: str) -> Iterator[None]:
    """Turn any failure of the block, which has no collective, into a warning: no picture is worth a run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the run has its weights and its results
        _log.warning("%s is not written: %s", what, " ".join(str(error).split()) or type(error).__name__)


class WorstRows:
    """The rows of highest loss of this rank's evaluation: float64 [n, F] on the device, whose first columns are loss
    and sample id. Equal losses rank by id, so that the ranks' rows unite to the same ones on any number of ranks.
    """

    def __init__(self, num_columns: int, device: torch.device, size: int = NUM_MISTAKES) -> None:
        self._size = size
        self._rows = torch.zeros(0, num_columns, dtype=torch.float64, device=device)

    def update(self, losses_B: Tensor, ids_B: Tensor, is_candidate_B: Tensor, *columns: Tensor) -> None:
        """Consider the candidates among B images; a loss of NaN is the highest. Reads nothing from the device."""
        losses_B = losses_B.double().nan_to_num(nan=math.inf, posinf=math.inf)
        losses_B = losses_B.masked_fill(~is_candidate_B, -math.inf)
        added = torch.stack([losses_B, *(column.double() for column in (ids_B, *columns))], dim=1)
        rows = torch.cat([self._rows, added])
        by_id = rows[rows[:, 1].argsort(stable=True)]
        self._rows = by_id[by_id[:, 0].argsort(descending=True, stable=True)][: self._size]

    def gather(self, run: Run) -> list[list[float]]:
        """Return the rows of highest loss of all ranks. A collective."""
        gathered = run.world.all_gather_objects(self._rows.tolist())
        rows = [row for of_rank in gathered for row in of_rank if row[0] > -math.inf]
        return sorted(rows, key=lambda row: (-row[0], row[1]))[: self._size]
