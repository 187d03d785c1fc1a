"""A grid of reconstructions: per image a row of original, masked and reconstructed image.

B images, C channels, L patches, M masked, P values per patch.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from foveal.inspect.image_grid import make_image_grid
from foveal.models.patches import gather_patches, patch_mean_and_std, patchify, unpatchify

GREY = 128  # value of a masked patch's pixels


def draw_reconstruction_grid(
    images: Tensor,
    predicted_patches: Tensor,
    masked_indices: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Image.Image:
    """Draw one row per image: the original, the visible patches, and the prediction with the visible patches pasted in.

    ``images`` uint8 [B, C, H, W]; ``predicted_patches`` [B, M, P] in the units of ``build_reconstruction_targets`` for
    images normalised by ``mean`` and ``std`` (C values each, of pixels in [0, 1]); ``masked_indices`` [B, M] int64.
    With ``norm_pix`` a prediction has no mean and deviation: each patch takes those of the original.
    """
    images = images.detach().cpu()
    predicted_patches = predicted_patches.detach().float().cpu()
    masked_indices = masked_indices.detach().cpu()
    predicted_pixels = _denormalise_patches(images, predicted_patches, masked_indices, mean, std, norm_pix)
    grey_pixels = torch.full_like(predicted_pixels, GREY)
    patch_size = math.isqrt(predicted_patches.shape[2] // images.shape[1])
    columns = [
        images,
        _paste_patches(images, grey_pixels, masked_indices, patch_size),
        _paste_patches(images, predicted_pixels, masked_indices, patch_size),
    ]
    return make_image_grid(columns)


def _denormalise_patches(
    images: Tensor,
    predicted_patches: Tensor,
    masked_indices: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    """Return predicted patches as pixels, uint8 [B, M, P]."""
    channels = images.shape[1]
    patch_size = math.isqrt(predicted_patches.shape[2] // channels)
    mean_C11, std_C11 = (torch.tensor(tuple(values)).view(channels, 1, 1) for values in (mean, std))
    if norm_pix:
        normalised_images = (images.float() / 255 - mean_C11) / std_C11
        original_BMP = gather_patches(patchify(normalised_images, patch_size), masked_indices)
        patch_mean, patch_std = patch_mean_and_std(original_BMP)
        predicted_patches = predicted_patches * patch_std + patch_mean
    channel_patches = predicted_patches.unflatten(2, (channels, patch_size * patch_size))
    pixels = channel_patches * std_C11.view(channels, 1) + mean_C11.view(channels, 1)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).flatten(2)


def _paste_patches(images: Tensor, patches: Tensor, masked_indices: Tensor, patch_size: int) -> Tensor:
    """Return the images with their masked patches replaced by ``patches`` [B, M, P]."""
    all_patches = patchify(images, patch_size).scatter(1, masked_indices[:, :, None].expand_as(patches), patches)
    return unpatchify(all_patches, patch_size, images.shape[2] // patch_size, images.shape[3] // patch_size)
