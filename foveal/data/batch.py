"""What the loader gives and an objective takes."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """A sample that does not decode, and the sample that stands in its row instead; by = -1: the row is left empty.

    ``draw`` and ``by`` count as ``Batch.draws``; ``offset`` is where its image begins in the shard, in bytes.
    """

    row: int
    sample_key: int
    replacement_key: int
    split: str
    shard: str
    webdataset_key: str
    byte_offset: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B images with C channels, H = W pixels a side, not normalised yet (see ``normalise``)."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]; -1: the sample has no label, or the row is padding
    ids: Tensor  # int64 [B]: positions in the manifest, those of data.mix after them; -1: padding
    sample_keys: Tensor  # int64 [B]: id + epoch * samples, what a row's randomness is keyed by; -1: padding
    valid: Tensor  # bool [B]; False: a row that only fills up the last batch of an evaluation, or did not decode there
    step: int
    epoch: int
    microbatch_index: int
    bad_samples: tuple[BadSample, ...] = ()
    # What ``Labels.together`` says, where a label is more than a class: uint8 [B, K], int16 [B, H, W] or float32 [B, n, 5].
    targets: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with its tensors on a device."""
        tensors = {name: getattr(self, name) for name in _TENSORS} | (
            {} if self.targets is None else {"targets": self.targets}
        )
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()}
        return dataclasses.replace(self, **moved)


_TENSORS = ("images", "labels", "ids", "sample_keys", "valid")
