"""The masked autoencoder's objective: reconstruct what was not shown (He et al., 2022, section 3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from foveal.data import Batch, normalise
from foveal.models.masks import MASKINGS, SHIFTS, Masking
from foveal.models.patches import count_kept, reconstruction_loss, targets
from foveal.seeding import key, uniforms


@dataclass(frozen=True)
class Reconstruct:
    """Mean squared error on masked patches. Which are masked depends on (seed, epoch, sample id), on no rank.

    ``grid`` is (rows, columns) of patches, ``mask_side`` what ``foveal.models.masks.mask_side`` says.
    """

    seed: int
    masking: Masking
    mask_ratio: float
    mask_side: int
    norm_pix: bool
    patch: int
    grid: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def noise(self, batch: Batch) -> Tensor:
        """Noise [B, L]; the patches with the lowest are shown."""
        numbers = uniforms(key(self.seed, "mask"), batch.draws, math.prod(self.grid) + SHIFTS)
        return MASKINGS[self.masking](numbers, *self.grid, self.mask_side)

    def weight(self, batch: Batch) -> float:
        """The number of masked patches, the same in every batch."""
        length = math.prod(self.grid)
        return float(len(batch.ids) * (length - count_kept(length, self.mask_ratio)))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, pred, masked = self.predict(model, batch)
        total, _ = reconstruction_loss(pred, targets(images, masked, self.patch, self.norm_pix))
        return total, {}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images [B, C, H, W], predicted patches [B, M, P] and their places [B, M]."""
        images = normalise(batch.images, self.mean, self.std)
        pred, masked = model(images, self.noise(batch), self.mask_ratio)
        return images, pred, masked
