"""What the metrics of several classes per image hide: results of every class, and the worst mistakes. N images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.evaluation_details import NUM_MISTAKES, Facts, recall_and_precision
from foveal.training.run import Run

_NAMED = 3  # classes of a caption's line


@dataclass(frozen=True)
class MultiLabelDetails:
    """Logits float [N, K] and truth uint8 [N, K] of all images by sample id [N], the same on every rank."""

    classes: Sequence[str]
    ids: np.ndarray
    logits: np.ndarray
    truth: np.ndarray

    def collect(self, run: Run, step: int) -> Callable[[], Facts]:
        """Return a function that describes the evaluation; nothing is to gather."""
        return self._describe

    def _describe(self) -> Facts:
        losses = self._losses()
        predicted, truth = self.logits > 0, self.truth > 0
        counts = (torch.from_numpy(values.sum(axis=0)) for values in (predicted & truth, truth, predicted))
        rows = recall_and_precision(*counts)
        return {
            "unit": "images",
            "num_images": len(self.ids),
            "per_class": [
                {"class": name, "support": int(truth[:, number].sum()), "average_precision": self._precision(number)}
                | row
                for number, (name, row) in enumerate(zip(self.classes, rows, strict=True))
            ],
            "mistakes": [self._describe_mistake(row, float(losses[row])) for row in self._worst_rows(losses)],
        }

    def _precision(self, number: int) -> float:
        from sklearn.metrics import average_precision_score

        truth = self.truth[:, number]
        return float(average_precision_score(truth, self.logits[:, number])) if truth.any() else float("nan")

    def _losses(self) -> np.ndarray:
        """Return the mean binary cross-entropy of every image, float64 [N]; NaN becomes infinite."""
        logits = self.logits.astype(np.float64)
        losses = np.logaddexp(0.0, logits) - logits * (self.truth > 0)
        return np.nan_to_num(losses.mean(axis=1), nan=np.inf, posinf=np.inf)

    def _worst_rows(self, losses: np.ndarray) -> list[int]:
        """Return the rows of the images of highest loss among those with a mistake; equal losses rank by sample id."""
        wrong = np.nonzero(((self.logits > 0) != (self.truth > 0)).any(axis=1))[0]
        order = np.lexsort((self.ids[wrong], -losses[wrong]))
        return wrong[order][:NUM_MISTAKES].tolist()

    def _describe_mistake(self, row: int, loss: float) -> Facts:
        predicted, truth = self.logits[row] > 0, self.truth[row] > 0
        true_names, missed, false = (
            [self.classes[number] for number in np.nonzero(chosen)[0].tolist()]
            for chosen in (truth, truth & ~predicted, predicted & ~truth)
        )
        return {
            "id": int(self.ids[row]),
            "loss": loss,
            "classes": true_names,
            "missed": missed,
            "false": false,
            "caption": [
                _enumerate(true_names),
                f"missed: {_enumerate(missed)}",
                f"false: {_enumerate(false)}",
                f"loss {loss:.3g}",
            ],
        }


def _enumerate(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more if names else "none"
