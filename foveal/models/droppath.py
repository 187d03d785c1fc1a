"""Stochastic depth (Huang et al., 2016) with random numbers as arguments, so that a sample's drops are its own."""

from timm.layers.drop import DropPath
from torch import Tensor, nn


class DropPathFromNoise(nn.Module):
    """Stochastic depth: zero a residual branch where a sample's noise is below the rate, else scale by 1 / (1 - rate).

    ``set_drop_path_noise`` sets the noise, which stays until the next call: recomputed activations need the same noise.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.noise: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """Return a branch [B, ...] with dropped samples at zero; in evaluation, the branch unchanged."""
        if not self.training:
            return branch
        assert self.noise is not None and len(self.noise) == len(branch), "a training forward needs set_drop_path_noise"
        scale_B = (self.noise >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * scale_B.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def replace_drop_paths(encoder: nn.Module) -> None:
    """Replace every ``DropPath`` of timm's, which draws from the global generator, by ``DropPathFromNoise``."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is DropPath:
                setattr(module, name, DropPathFromNoise(child.drop_prob))


def count_drop_paths(encoder: nn.Module) -> int:
    """Return the number of noise values per sample: one per branch whose rate is not zero."""
    return len(_find_drop_paths(encoder))


def set_drop_path_noise(encoder: nn.Module, noise: Tensor | None) -> None:
    """Set the noise of the next forward: uniform [B, count_drop_paths(encoder)], a column per branch in block order."""
    drop_paths = _find_drop_paths(encoder)
    if noise is not None:
        assert noise.shape[1] == len(drop_paths), f"{len(drop_paths)} drop paths, noise of shape {tuple(noise.shape)}"
    for column, drop_path in enumerate(drop_paths):
        drop_path.noise = None if noise is None else noise[:, column]


def _find_drop_paths(encoder: nn.Module) -> list[DropPathFromNoise]:
    return [module for module in encoder.modules() if isinstance(module, DropPathFromNoise)]
