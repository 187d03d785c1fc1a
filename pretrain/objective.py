"""What is learned from masked images: their pixels (He et al., 2022), their features, and the whole they are part of.

B images, L patches, M masked ones of each, P numbers per patch, D encoder width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from foveal.data import Batch, normalise
from foveal.models.mae import MAEOutput
from foveal.models.masks import MASK_NOISE_FUNCTIONS, NUM_OFFSET_DRAWS, MaskStrategy
from foveal.models.patches import build_reconstruction_targets, count_visible, gather_patches, reconstruction_loss
from foveal.seeding import derive_key, draw_uniform

PredictionTarget = Literal["pixels", "latents"]


@dataclass(frozen=True)
class MaskedModelingLoss:
    """Guess what was not shown. Which patches are masked depends on (seed, epoch, sample id), on no rank.

    ``grid`` is (rows, columns) of patches, ``mask_side`` what ``foveal.models.masks.mask_side`` says.
    """

    seed: int
    mask_strategy: MaskStrategy
    mask_ratio: float
    mask_block_size: int
    norm_pix: bool
    patch_size: int
    patch_grid: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    target: PredictionTarget = "pixels"
    image_loss_weight: float = 0.0

    def draw_mask_noise(self, batch: Batch) -> Tensor:
        """Noise [B, L]; the patches with the lowest are shown."""
        numbers = draw_uniform(
            derive_key(self.seed, "mask"), batch.sample_keys, math.prod(self.patch_grid) + NUM_OFFSET_DRAWS
        )
        return MASK_NOISE_FUNCTIONS[self.mask_strategy](numbers, *self.patch_grid, self.mask_block_size)

    def batch_weight(self, batch: Batch) -> float:
        """The number of masked patches, the same in every batch."""
        length = math.prod(self.patch_grid)
        return float(len(batch.ids) * (length - count_visible(length, self.mask_ratio)))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, guesses = self.predict(model, batch)
        total = TARGET_LOSSES[self.target](self, images, guesses)
        if not self.image_loss_weight:
            return total, {}
        # An image counts as often as it has masked patches: the loss is one mean plus another.
        whole = image_loss(guesses).sum() * guesses.masked_indices.shape[1]
        return total + self.image_loss_weight * whole, {"patch_loss": total, "image_loss": whole}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, MAEOutput]:
        """Normalised images [B, C, H, W], and what the model says of them."""
        images = normalise(batch.images, self.mean, self.std)
        return images, model(images, self.draw_mask_noise(batch), self.mask_ratio)


def pixel_loss(objective: MaskedModelingLoss, images: Tensor, output: MAEOutput) -> Tensor:
    """Mean squared error over the P pixels of a patch, summed over masked patches (He et al., 2022, section 3)."""
    wanted_BMP = build_reconstruction_targets(images, output.masked_indices, objective.patch_size, objective.norm_pix)
    return reconstruction_loss(output.patch_pred, wanted_BMP)[0]


def feature_loss(_objective: MaskedModelingLoss, _images: Tensor, output: MAEOutput) -> Tensor:
    """Huber loss with threshold 1, mean over D, summed over masked patches.

    The target is what the averaged encoder makes of the full image, each patch brought to mean 0 and variance 1 (I-JEPA,
    Assran et al., 2023, sections 3 and A.1; data2vec, Baevski et al., 2022).
    """
    wanted_BMD = standardize_features(gather_patches(_full_image_features(output), output.masked_indices))
    return F.smooth_l1_loss(output.patch_pred.float(), wanted_BMD, reduction="none").mean(dim=-1).sum()


TARGET_LOSSES: dict[PredictionTarget, Callable[[MaskedModelingLoss, Tensor, MAEOutput], Tensor]] = {
    "pixels": pixel_loss,
    "latents": feature_loss,
}


def image_loss(output: MAEOutput) -> Tensor:
    """Squared error [B], mean over D, of the guess of the mean of a full image's patches, brought to mean 0 and variance 1.

    The mean of patches, and not the class token: what masked patches teach keeps it from being the same for all images.
    """
    assert output.image_pred is not None, "MaskedAutoencoder(image=True) guesses it"
    wanted_BD = standardize_features(_full_image_features(output).float().mean(dim=1))
    return (output.image_pred.float() - wanted_BD).square().mean(dim=-1)


def standardize_features(features: Tensor) -> Tensor:
    """Features [..., D] brought to mean 0 and variance 1 over D, float32."""
    return F.layer_norm(features.float(), features.shape[-1:])


def _full_image_features(output: MAEOutput) -> Tensor:
    assert output.target_features is not None, "MaskedAutoencoder(latents=True or image=True) looks at the full images"
    return output.target_features
