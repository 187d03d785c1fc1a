"""Cross-entropy on labels, with smoothing; images without a label count for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.data import Batch, normalise
from foveal.seeding import key, uniforms

_UNLABELLED = -1
NUMBERS = ("top1", "top5", "loss")  # of an evaluation


@dataclass(frozen=True)
class Classify:
    """Softmax cross-entropy. Which sample skips which block depends on (seed, epoch, sample id), on no rank."""

    seed: int
    label_smoothing: float
    drop_sites: int
    mean: Sequence[float]
    std: Sequence[float]

    def weight(self, batch: Batch) -> Tensor:
        """The number of images that have a label."""
        return (batch.labels != _UNLABELLED).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = normalise(batch.images, self.mean, self.std)
        drops = uniforms(key(self.seed, "drop path"), batch.draws, self.drop_sites)
        logits_BK = model(images, drops).float()
        total = F.cross_entropy(
            logits_BK, batch.labels, reduction="sum", ignore_index=_UNLABELLED, label_smoothing=self.label_smoothing
        )
        return total, {"train_top1": (logits_BK.argmax(dim=1) == batch.labels).sum()}


@torch.no_grad()
def hits(logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor) -> Tensor:
    """Counts over a batch, float64 [4]: right at first guess, right among five, summed cross-entropy, images."""
    known_B = valid_B & (labels_B != _UNLABELLED)
    guesses_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    right_B5 = (guesses_B5 == labels_B[:, None]) & known_B[:, None]
    losses_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=_UNLABELLED) * known_B
    return torch.stack([right_B5[:, 0].sum(), right_B5.sum(), losses_B.double().sum(), known_B.sum()]).double()
