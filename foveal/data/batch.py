"""What the loader gives and an objective takes."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B images with C channels, H = W pixels a side, not normalised yet (see ``normalise``)."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]; -1: the sample has no label, or the row is padding
    ids: Tensor  # int64 [B]: positions in the manifest; -1: padding
    valid: Tensor  # bool [B]; False: a row that only fills up the last batch of an evaluation
    step: int
    epoch: int
    micro: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with its tensors on a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return dataclasses.replace(self, **moved)


_TENSORS = ("images", "labels", "ids", "valid")
