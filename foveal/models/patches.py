"""Patches, masks and the reconstruction loss: arithmetic on tensors, without parameters and without randomness.

B images, C channels, H height, W width, p patch side, L patches, K kept, M masked, P = C * p * p numbers per patch.
"""

import math

import torch
from torch import Tensor

from foveal.errors import ConfigError

VARIANCE_EPS = 1e-6  # added to a patch's variance, as in the reference implementation of MAE


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] as patches [B, L, P], row by row; P is ordered (channel, row, column).

    That is the order of a convolution's weight, so ``weight.flatten(1)`` embeds such a patch.
    """
    batch, channels, height, width = images.shape
    assert height % patch_size == 0 and width % patch_size == 0, f"{height}x{width} pixels, patches of {patch_size}"
    grid_BChpwp = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid_BChpwp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """The inverse of ``patchify``: patches [B, L, P] of a grid of rows x columns as images [B, C, H, W]."""
    grid_BhwCpp = patches.reshape(patches.shape[0], rows, columns, -1, patch_size, patch_size)
    return grid_BhwCpp.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * patch_size, columns * patch_size)


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """The patches [B, N, P] at given places [B, N] of all patches [B, L, P]."""
    return patches.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """How many of ``length`` patches stay visible when ``ratio`` of them are masked.

    The whole part of length * (1 - ratio), but of the real number: in floating point 100 * (1 - 0.9) is 9.999..., which
    would mask one patch too many. At 196 patches it equals the reference implementation for every ratio.
    Raises: ConfigError when nothing would stay visible.
    """
    kept = math.floor(num_patches * (1 - mask_ratio) + 1e-6)
    if kept < 1:
        raise ConfigError(
            f"mask ratio {mask_ratio} leaves none of {num_patches} patches visible; at most {1 - 1 / num_patches:.4f} leaves one"
        )
    return kept


def split_patches_by_noise(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Which patches to keep [B, K] and which to mask [B, M], from noise [B, L]: the lowest are kept.

    Both are int64 places in ascending order of their noise; equal noise goes by place, the same on every device.
    """
    # Half precision has so few values between 0 and 1 that ties would favour the upper left of every image.
    assert noise.dtype in (torch.float32, torch.float64), f"mask noise became {noise.dtype}"
    kept = count_visible(noise.shape[1], mask_ratio)
    order_BL = noise.argsort(dim=1, stable=True)
    return order_BL[:, :kept], order_BL[:, kept:]


def patch_mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, N, 1] of each patch [B, N, P] (unbiased variance plus ``VARIANCE_FLOOR``)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + VARIANCE_EPS).sqrt()


def build_reconstruction_targets(images: Tensor, masked_indices: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """What to reconstruct: the masked [B, M] patches of normalised images [B, C, H, W], as float32 [B, M, P].

    With ``normalise`` each patch is brought to mean 0 and variance 1 (He et al., 2022, section 4, "reconstruction target").
    """
    wanted_BMP = gather_patches(patchify(images.float(), patch_size), masked_indices)
    if not norm_pix:
        return wanted_BMP
    mean_BM1, deviation_BM1 = patch_mean_and_std(wanted_BMP)
    return (wanted_BMP - mean_BM1) / deviation_BM1


def patch_mse(pred: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, float32 [B, M], of each masked patch; both arguments are [B, M, P]."""
    return (pred.float() - target).square().mean(dim=-1)


def reconstruction_loss(pred: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The sum over masked patches of their mean squared error (float32), and the number of masked patches.

    Both arguments are [B, M, P]. The loss is the first over the second, each summed over micros and ranks.
    """
    error_BM = patch_mse(pred, target)
    return error_BM.sum(), error_BM.numel()
