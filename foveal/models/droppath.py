"""Stochastic depth (Huang et al., 2016) whose draws are given, so that a sample's fate depends on the sample alone."""

from timm.layers.drop import DropPath
from torch import Tensor, nn


class DropPathFromNoise(nn.Module):
    """Drop a residual branch for the samples whose number is below the rate; scale the others by 1 / (1 - rate).

    The numbers come from ``set_drops`` and stay until the next one: recomputed activations must see the same.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.noise: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """A branch [B, ...] with the dropped samples at zero; in evaluation, the branch itself."""
        if not self.training:
            return branch
        assert self.noise is not None and len(self.noise) == len(branch), "set_drops comes before a training forward"
        scale_B = (self.noise >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * scale_B.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def replace_drop_paths(encoder: nn.Module) -> None:
    """Replace every timm ``DropPath`` inside an encoder, which draws from the global generator, by a sampled one."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is DropPath:
                setattr(module, name, DropPathFromNoise(child.drop_prob))


def count_drop_paths(encoder: nn.Module) -> int:
    """How many numbers per sample ``set_drops`` takes: one per branch whose rate is not zero."""
    return len(_find_drop_paths(encoder))


def set_drop_path_noise(encoder: nn.Module, noise: Tensor | None) -> None:
    """Give the draws of the next forward: uniform [B, drop_path_sites(encoder)], column by column in block order."""
    sites = _find_drop_paths(encoder)
    assert noise is None or noise.shape[1] == len(sites), f"{len(sites)} sites, noise of shape {tuple(noise.shape)}"
    for column, site in enumerate(sites):
        site.noise = None if noise is None else noise[:, column]


def _find_drop_paths(encoder: nn.Module) -> list[DropPathFromNoise]:
    return [module for module in encoder.modules() if isinstance(module, DropPathFromNoise)]
