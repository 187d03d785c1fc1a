"""Losses of masked image modelling: pixels (He et al., 2022), features, and the full image's mean feature.

B images, L patches, M masked patches per image, P values per patch, D encoder width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.models.config import MaskStrategy
from foveal.models.mae import MAEOutput
from foveal.models.masks import MASK_NOISE_FUNCTIONS, NUM_OFFSET_DRAWS
from foveal.models.patches import build_reconstruction_targets, count_visible, gather_patches, reconstruction_loss
from foveal.seeding import derive_key, draw_uniform
from pretrain.config import PredictionTarget


@dataclass(frozen=True)
class MaskedModelingLoss:
    """Predict the masked patches. Masks depend on (seed, epoch, sample id), not on ranks.

    ``patch_grid`` is (rows, columns); ``mask_block_size`` comes from ``foveal.models.masks.resolve_mask_block_size``.
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
        """Return noise [B, L]; the patches with the lowest noise are visible."""
        num_draws = math.prod(self.patch_grid) + NUM_OFFSET_DRAWS
        uniforms = draw_uniform(derive_key(self.seed, "mask"), batch.sample_keys, num_draws)
        return MASK_NOISE_FUNCTIONS[self.mask_strategy](uniforms, *self.patch_grid, self.mask_block_size)

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of masked patches, the same in every batch."""
        num_patches = math.prod(self.patch_grid)
        return float(len(batch.ids) * (num_patches - count_visible(num_patches, self.mask_ratio)))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, output = self.predict(model, batch)
        patch_sum = TARGET_LOSSES[self.target](self, images, output)
        if not self.image_loss_weight:
            return patch_sum, {}
        # Scaled by M, since the denominator is masked patches: the loss is a mean over patches plus one over images.
        image_sum = image_loss_per_image(output).sum() * output.masked_indices.shape[1]
        return patch_sum + self.image_loss_weight * image_sum, {"patch_loss": patch_sum, "image_loss": image_sum}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, MAEOutput]:
        """Return the normalised images [B, C, H, W] and the model's output for them."""
        images = normalise(batch.images, self.mean, self.std)
        return images, model(images, self.draw_mask_noise(batch), self.mask_ratio)


def pixel_loss_sum(objective: MaskedModelingLoss, images: Tensor, output: MAEOutput) -> Tensor:
    """Mean squared error over the P pixels of a patch, summed over masked patches (He et al., 2022, section 3)."""
    target_BMP = build_reconstruction_targets(images, output.masked_indices, objective.patch_size, objective.norm_pix)
    return reconstruction_loss(output.masked_patch_pred, target_BMP)[0]


def feature_loss_sum(_objective: MaskedModelingLoss, _images: Tensor, output: MAEOutput) -> Tensor:
    """Huber loss with threshold 1, mean over D, summed over masked patches.

    The target is the EMA encoder's features of the full image, each patch standardised to mean 0 and variance 1. Both
    are those of I-JEPA's code (Assran et al., 2023), whose paper has a squared distance (section 3), after data2vec
    (Baevski et al., 2022).
    """
    target_BMD = standardize_features(gather_patches(_full_image_features(output), output.masked_indices))
    return F.smooth_l1_loss(output.masked_patch_pred.float(), target_BMD, reduction="none").mean(dim=-1).sum()


TARGET_LOSSES: dict[PredictionTarget, Callable[[MaskedModelingLoss, Tensor, MAEOutput], Tensor]] = {
    "pixels": pixel_loss_sum,
    "features": feature_loss_sum,
}


def image_loss_per_image(output: MAEOutput) -> Tensor:
    """Squared error [B], mean over D; the target is the mean of the full image's patches, standardised.

    The target is not the class token: only patches are kept from collapse, by the loss of masked patches.
    """
    assert output.image_pred is not None, "needs MaskedAutoencoder(predict_image=True)"
    target_BD = standardize_features(_full_image_features(output).float().mean(dim=1))
    return (output.image_pred.float() - target_BD).square().mean(dim=-1)


def standardize_features(features: Tensor) -> Tensor:
    """Return features [..., D] standardised to mean 0 and variance 1 over D, in float32."""
    return F.layer_norm(features.float(), features.shape[-1:])


def _full_image_features(output: MAEOutput) -> Tensor:
    assert output.target_features is not None, "needs MaskedAutoencoder(predict_features=True or predict_image=True)"
    return output.target_features
