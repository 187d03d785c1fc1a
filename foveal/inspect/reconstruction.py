"""A grid of reconstructions: per image a row of original, visible patches, and prediction.

B images, C channels, L patches, M masked, P values per patch.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from foveal.inspect.image_grid import draw_image_grid
from foveal.models.patches import gather_patches, patch_mean_and_std, patchify, unpatchify

GREY = 128  # value of a masked patch's pixels, and of a normalised patch's mean
DEVIATIONS = 2.5  # standard deviations from a normalised patch's mean to black and to white
_NOTE = "Predicted are the masked patches; the visible ones are the original's."
_NORMALISED_NOTES = (
    f"Normalised by patch: grey is the mean of a patch, black and white are {DEVIATIONS} standard deviations from it.",
    "Last column: mean and deviation of every masked patch are taken from the original. The model does not predict them.",
)


def draw_reconstruction_grid(
    images: Tensor,
    predicted_patches: Tensor,
    masked_indices: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    title: str = "",
) -> Image.Image:
    """Draw one row per image: the original, its visible patches, and the prediction beside the visible patches.

    ``images`` uint8 [B, C, H, W]; ``predicted_patches`` [B, M, P] in the units of ``build_reconstruction_targets`` for
    images normalised by ``mean`` and ``std`` (C values each, of pixels in [0, 1]); ``masked_indices`` [B, M] int64.
    With ``norm_pix`` a prediction has no mean and deviation. It is drawn as it is, beside its target in the same units,
    and in a column of its own with the mean and deviation of the original's patch.
    """
    images, masked = images.detach().cpu(), masked_indices.detach().cpu()
    predicted = predicted_patches.detach().float().cpu()
    patch_size = math.isqrt(predicted.shape[2] // images.shape[1])
    mean_C11, std_C11 = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std))
    patches_BLP = patchify((images.float() / 255 - mean_C11) / std_C11, patch_size)
    grid_hw = images.shape[2] // patch_size, images.shape[3] // patch_size

    def paste(patches_BMP: Tensor, target_BLP: Tensor) -> Tensor:
        """Return images [B, C, H, W] of ``target_BLP`` with the masked patches replaced."""
        pasted = target_BLP.scatter(1, masked[:, :, None].expand_as(patches_BMP), patches_BMP)
        return unpatchify(pasted, patch_size, *grid_hw)

    def to_pixels(normalised_BCHW: Tensor) -> Tensor:
        return ((normalised_BCHW * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)

    grey_BMP = torch.full_like(predicted, GREY).to(torch.uint8)
    columns = {"original": images, "visible to the encoder": paste(grey_BMP, patchify(images, patch_size))}
    if not norm_pix:
        columns["predicted"] = to_pixels(paste(predicted, patches_BLP))
        return draw_image_grid(columns, title=title, notes=(_NOTE,))
    mean_BL1, std_BL1 = patch_mean_and_std(patches_BLP)
    target_BLP = (patches_BLP - mean_BL1) / std_BL1
    borrowed_BMP = predicted * gather_patches(std_BL1, masked) + gather_patches(mean_BL1, masked)
    columns |= {
        "original, normalised by patch": _to_grey_range(unpatchify(target_BLP, patch_size, *grid_hw)),
        "predicted, as it is": _to_grey_range(paste(predicted, target_BLP)),
        "predicted, with the original's brightness and contrast": to_pixels(paste(borrowed_BMP, patches_BLP)),
    }
    return draw_image_grid(columns, title=title, notes=(_NOTE, *_NORMALISED_NOTES))


def _to_grey_range(normalised_BCHW: Tensor) -> Tensor:
    """Return values of mean 0 and variance 1 as pixels, uint8."""
    return (GREY + normalised_BCHW * (127 / DEVIATIONS)).round().clamp(0, 255).to(torch.uint8)
