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
from foveal.models.mae import Guesses
from foveal.models.masks import MASKINGS, SHIFTS, Masking
from foveal.models.patches import count_kept, reconstruction_loss, take, targets
from foveal.seeding import key, uniforms

Target = Literal["pixels", "latents"]


@dataclass(frozen=True)
class Reconstruct:
    """Guess what was not shown. Which patches are masked depends on (seed, epoch, sample id), on no rank.

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
    target: Target = "pixels"
    image_weight: float = 0.0

    def noise(self, batch: Batch) -> Tensor:
        """Noise [B, L]; the patches with the lowest are shown."""
        numbers = uniforms(key(self.seed, "mask"), batch.draws, math.prod(self.grid) + SHIFTS)
        return MASKINGS[self.masking](numbers, *self.grid, self.mask_side)

    def weight(self, batch: Batch) -> float:
        """The number of masked patches, the same in every batch."""
        length = math.prod(self.grid)
        return float(len(batch.ids) * (length - count_kept(length, self.mask_ratio)))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, guesses = self.predict(model, batch)
        total = LOSSES[self.target](self, images, guesses)
        if not self.image_weight:
            return total, {}
        # An image counts as often as it has masked patches: the loss is one mean plus another.
        whole = image_loss(guesses).sum() * guesses.masked.shape[1]
        return total + self.image_weight * whole, {"patch_loss": total, "image_loss": whole}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Guesses]:
        """Normalised images [B, C, H, W], and what the model says of them."""
        images = normalise(batch.images, self.mean, self.std)
        return images, model(images, self.noise(batch), self.mask_ratio)


def pixel_loss(objective: Reconstruct, images: Tensor, guesses: Guesses) -> Tensor:
    """Mean squared error over the P pixels of a patch, summed over masked patches (He et al., 2022, section 3)."""
    wanted_BMP = targets(images, guesses.masked, objective.patch, objective.norm_pix)
    return reconstruction_loss(guesses.patches, wanted_BMP)[0]


def latent_loss(_objective: Reconstruct, _images: Tensor, guesses: Guesses) -> Tensor:
    """Huber loss with threshold 1, mean over D, summed over masked patches.

    The target is what the averaged encoder makes of the full image, each patch brought to mean 0 and variance 1 (I-JEPA,
    Assran et al., 2023, sections 3 and A.1; data2vec, Baevski et al., 2022).
    """
    wanted_BMD = standardised(take(_seen(guesses), guesses.masked))
    return F.smooth_l1_loss(guesses.patches.float(), wanted_BMD, reduction="none").mean(dim=-1).sum()


LOSSES: dict[Target, Callable[[Reconstruct, Tensor, Guesses], Tensor]] = {"pixels": pixel_loss, "latents": latent_loss}


def image_loss(guesses: Guesses) -> Tensor:
    """Squared error [B], mean over D, of the guess of the mean of a full image's patches, brought to mean 0 and variance 1.

    The mean of patches, and not the class token: what masked patches teach keeps it from being the same for all images.
    """
    assert guesses.image is not None, "MaskedAutoencoder(image=True) guesses it"
    wanted_BD = standardised(_seen(guesses).float().mean(dim=1))
    return (guesses.image.float() - wanted_BD).square().mean(dim=-1)


def standardised(features: Tensor) -> Tensor:
    """Features [..., D] brought to mean 0 and variance 1 over D, float32."""
    return F.layer_norm(features.float(), features.shape[-1:])


def _seen(guesses: Guesses) -> Tensor:
    assert guesses.seen is not None, "MaskedAutoencoder(latents=True or image=True) looks at the full images"
    return guesses.seen
