"""Features of patches as colours: their first three principal components. B images, D width, n = B * rows * columns."""

import torch
from torch import Tensor

_LOW, _HIGH = 0.01, 0.99  # quantiles of a component that are drawn as 0 and 255


def project_to_colors(features: Tensor) -> tuple[Tensor, list[float]]:
    """Return maps [B, D, rows, columns] as colours uint8 [B, 3, rows, columns], and each component's share of variance.

    The components are those of all images together, red the first. The sign of a component is arbitrary; here its
    largest weight is positive.
    """
    num_images, width, rows, columns = features.shape
    values_nD = features.permute(0, 2, 3, 1).reshape(-1, width).double()
    values_nD = values_nD - values_nD.mean(0)
    count = min(3, *values_nD.shape)
    axes_kD, variances = _principal_axes(values_nD, count)
    projected_n3 = values_nD @ axes_kD.T
    low, high = (torch.quantile(projected_n3, part, dim=0) for part in (_LOW, _HIGH))
    spread = (high - low).clamp_min(1e-12)
    colors_n3 = torch.full((len(values_nD), 3), 128.0, dtype=torch.float64)
    is_seen = variances > 1e-9  # a component without variance is grey
    colors_n3[:, :count] = torch.where(is_seen, ((projected_n3 - low) / spread).clamp(0, 1) * 255, 128.0)
    colors = colors_n3.round().to(torch.uint8).reshape(num_images, rows, columns, 3).permute(0, 3, 1, 2)
    return colors.contiguous(), variances.tolist() + [0.0] * (3 - count)


def compute_position_share(features: Tensor) -> float | None:
    """Return the share of the variance of maps [B, D, rows, columns] that depends on the position only.

    An estimate without bias in B, cut off at 0. None for one image, or without variance.
    """
    num_images = len(features)
    values = features.double()
    total = (values - values.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    if num_images < 2 or float(total) <= 0:
        return None
    within = (values - values.mean(dim=0, keepdim=True)).square().mean() * num_images / (num_images - 1)
    return max(0.0, float(1 - within / total))


def _principal_axes(values_nD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first axes [k, D] of centred values, and their shares of the variance [k]."""
    n, width = values_nD.shape
    total = values_nD.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    is_wide = width > n
    gram = values_nD @ values_nD.T if is_wide else values_nD.T @ values_nD
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues, vectors = eigenvalues[-count:].flip(0).clamp_min(0), vectors[:, -count:].flip(1)
    axes_kD = torch.nn.functional.normalize((values_nD.T @ vectors if is_wide else vectors).T, dim=1)
    largest = axes_kD.gather(1, axes_kD.abs().argmax(1, keepdim=True))
    return axes_kD * torch.where(largest < 0, -1.0, 1.0), eigenvalues / total
