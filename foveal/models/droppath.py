"""Stochastic depth (Huang et al., 2016) with random numbers as arguments, so that a sample's drops are its own."""

from timm.layers.drop import DropPath
from torch import Tensor, nn


class DropPathFromNoise(nn.Module):
    """Stochastic depth: zero a residual branch where a sample's noise is below the rate, else scale by 1 / (1 - rate).

    ``set_noise`` holds until the next call: recomputed activations need the same noise. The rate, which differs between
    blocks, is not read in the forward: blocks that differ in a number alone share compiled code.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._scale_B: Tensor | None = None

    def set_noise(self, noise_B: Tensor | None) -> None:
        """Set the noise of the next forward, uniform [B]."""
        self._scale_B = None if noise_B is None else (noise_B >= self.rate) / (1 - self.rate)

    def forward(self, branch: Tensor) -> Tensor:
        """Return a branch [B, ...] with dropped samples at zero; in evaluation, the branch unchanged."""
        if not self.training:
            return branch
        scale_B = self._scale_B
        assert scale_B is not None and len(scale_B) == len(branch), "a training forward needs set_drop_path_noise"
        return branch * scale_B.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))

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
        drop_path.set_noise(None if noise is None else noise[:, column])


def _find_drop_paths(encoder: nn.Module) -> list[DropPathFromNoise]:
    return [module for module in encoder.modules() if isinstance(module, DropPathFromNoise)]
