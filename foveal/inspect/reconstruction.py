"""A sheet of reconstructions: for every image a row of original, masked, reconstructed.

B images, C channels, L patches, M masked, P numbers per patch.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from foveal.inspect.image_grid import make_image_grid
from foveal.models.patches import gather_patches, patch_mean_and_std, patchify, unpatchify

GREY = 128  # a masked patch


def draw_reconstruction_grid(
    images: Tensor,
    predicted_patches: Tensor,
    masked_indices: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Image.Image:
    """One row per image: the original, what the encoder saw, and the guess with the visible patches pasted in.

    ``images`` uint8 [B, C, H, W]; ``pred`` [B, M, P] in the units of ``patches.targets`` of the images normalised by
    ``mean`` and ``std`` (C numbers each, of pixels in [0, 1]); ``masked`` [B, M] int64. With ``normalise`` the guess has
    no brightness and contrast of its own, so each patch is given those of the original.
    """
    images, predicted_patches, masked_indices = (
        images.detach().cpu(),
        predicted_patches.detach().float().cpu(),
        masked_indices.detach().cpu(),
    )
    guess = _denormalise_patches(images, predicted_patches, masked_indices, mean, std, norm_pix)
    patch = math.isqrt(predicted_patches.shape[2] // images.shape[1])
    grey = torch.full_like(guess, GREY)
    columns = [
        images,
        _paste_patches(images, grey, masked_indices, patch),
        _paste_patches(images, guess, masked_indices, patch),
    ]
    return make_image_grid(columns)


def _denormalise_patches(
    images: Tensor, pred: Tensor, masked: Tensor, mean: Sequence[float], std: Sequence[float], normalise: bool
) -> Tensor:
    channels = images.shape[1]
    patch = math.isqrt(pred.shape[2] // channels)
    mean_C11, std_C11 = (torch.tensor(tuple(told)).view(channels, 1, 1) for told in (mean, std))
    if normalise:
        original_BMP = gather_patches(patchify((images.float() / 255 - mean_C11) / std_C11, patch), masked)
        brightness, contrast = patch_mean_and_std(original_BMP)
        pred = pred * contrast + brightness
    pixels = pred.unflatten(2, (channels, patch * patch)) * std_C11.view(channels, 1) + mean_C11.view(channels, 1)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).flatten(2)


def _paste_patches(images: Tensor, patches: Tensor, masked: Tensor, patch: int) -> Tensor:
    """The images with other patches [B, M, P] at the masked places."""
    whole = patchify(images, patch).scatter(1, masked[:, :, None].expand_as(patches), patches)
    return unpatchify(whole, patch, images.shape[2] // patch, images.shape[3] // patch)
