"""Patches, masks and the reconstruction loss: tensor arithmetic without parameters or randomness.

B images, C channels, H height, W width, p patch side, L patches, K visible, M masked, P = C * p * p values per patch.
"""

import math

import torch
from torch import Tensor

from foveal.errors import ConfigError

VARIANCE_EPS = 1e-6  # added to a patch's variance, as in the reference implementation of MAE


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return images [B, C, H, W] as patches [B, L, P], row by row; P is ordered (channel, row, column).

    This is the order of a convolution's weight, so ``weight.flatten(1)`` embeds such a patch.
    """
    batch, channels, height, width = images.shape
    assert height % patch_size == 0 and width % patch_size == 0, f"{height}x{width} pixels, patches of {patch_size}"
    grid_BChpwp = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid_BChpwp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """Invert ``patchify``: return patches [B, L, P] of a grid of rows x columns as images [B, C, H, W]."""
    grid_BhwCpp = patches.reshape(patches.shape[0], rows, columns, -1, patch_size, patch_size)
    return grid_BhwCpp.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * patch_size, columns * patch_size)


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Return the patches [B, N, P] at ``indices`` [B, N] of all patches [B, L, P]."""
    return patches.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches: floor(num_patches * (1 - mask_ratio)), evaluated in real numbers.

    In floating point 100 * (1 - 0.9) is 9.999..., which would mask one patch too many, as MAE's int(L * (1 - ratio))
    does. At 196 patches both counts are equal for every ratio of up to three decimals; they differ for 34 of the 195
    ratios k / 196 (at 195 / 196 MAE's code shows no patch, this one shows one).
    Raises: ConfigError if no patch would stay visible.
    """
    num_visible = math.floor(num_patches * (1 - mask_ratio) + 1e-6)
    if num_visible < 1:
        lower_ratio = f"at most {1 - 1 / num_patches:.4f} leaves one; or " if num_patches > 1 else ""
        raise ConfigError(
            f"mask ratio {mask_ratio} leaves none of {num_patches} patches visible; {lower_ratio}make more patches, with "
            f"a smaller model.patch or a larger data.image_size"
        )
    return num_visible


def split_patches_by_noise(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Return (visible [B, K], masked [B, M]) patch indices from noise [B, L]: the lowest noise stays visible.

    Indices are int64 in ascending order of noise; equal noise is ordered by index, the same on every device.
    """
    # Half precision has so few values between 0 and 1 that ties would favour the upper left of every image.
    assert noise.dtype in (torch.float32, torch.float64), f"mask noise became {noise.dtype}"
    num_visible = count_visible(noise.shape[1], mask_ratio)
    order_BL = noise.argsort(dim=1, stable=True)
    return order_BL[:, :num_visible], order_BL[:, num_visible:]


def patch_mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [B, N, 1] of patches [B, N, P] (unbiased variance plus ``VARIANCE_EPS``)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + VARIANCE_EPS).sqrt()


def build_reconstruction_targets(images: Tensor, masked_indices: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """Return the masked [B, M] patches of normalised images [B, C, H, W] as reconstruction targets, float32 [B, M, P].

    ``norm_pix`` normalises each patch to mean 0 and variance 1 (He et al., 2022, section 4, "reconstruction target").
    """
    target_BMP = gather_patches(patchify(images.float(), patch_size), masked_indices)
    if not norm_pix:
        return target_BMP
    mean_BM1, std_BM1 = patch_mean_and_std(target_BMP)
    return (target_BMP - mean_BM1) / std_BM1


def patch_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each masked patch, float32 [B, M]; both arguments are [B, M, P]."""
    return (pred.float() - target).square().mean(dim=-1)


def reconstruction_loss(pred: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Return the masked patches' mean squared errors, summed (float32), and the number of masked patches.

    Both arguments are [B, M, P]. The loss is the sum over the number, each summed over microbatches and ranks.
    """
    error_BM = patch_mse(pred, target)
    return error_BM.sum(), error_BM.numel()
