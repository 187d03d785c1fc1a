"""The microbatch that the loader yields and an objective consumes."""

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """A sample that does not decode, and its replacement.

    ``sample_key`` and ``replacement_key`` count as ``Batch.sample_keys``; ``replacement_key`` -1: the row stays empty.
    ``byte_offset`` is the start of the image in the shard.
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
    """One microbatch of B images with C channels and H x W pixels, not normalised yet (see ``normalise``)."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]; -1: the sample has no label, or the row is padding
    ids: Tensor  # int64 [B]: positions in the split, then those of the data.mix sets; -1: padding
    sample_keys: Tensor  # int64 [B]: id + epoch * number of ids, the key of a row's randomness; -1: padding
    valid: Tensor  # bool [B]; False in evaluation only: padding of the last batch, or a sample that does not decode
    step: int
    epoch: int
    microbatch_index: int
    bad_samples: tuple[BadSample, ...] = ()
    # Labels that a ``LabelReader`` reads: uint8 [B, K], int16 [B, H, W] or float32 [B, n, 5].
    targets: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch by name."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return tensors if self.targets is None else tensors | {"targets": self.targets}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on a device."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors().items()}
        if non_blocking and moved["images"].is_cuda:
            # A loader writes its next microbatch into this memory as soon as nothing holds it.
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(moved["images"].device))
            _copies_under_way.append((copied, self))
            release_finished_copies()
        return dataclasses.replace(self, **moved)

    def select_rows(self, rows: Tensor) -> Self:
        """Return the batch of these rows, int64 [n]; ``bad_samples`` keep their row numbers in this batch."""
        return dataclasses.replace(self, **{name: value[rows] for name, value in self.tensors().items()})


def release_finished_copies(*, wait: bool = False) -> None:
    """Let go of batches whose copies to a GPU are done; ``wait``: for the device to finish all of them."""
    while _copies_under_way:
        event, _ = _copies_under_way[0]
        if wait:
            event.synchronize()
        elif not event.query():
            return
        _copies_under_way.popleft()


def wait_for_oldest_copy() -> bool:
    """Wait until the device has finished the oldest copy under way; return whether there was one."""
    if not _copies_under_way:
        return False
    _copies_under_way.popleft()[0].synchronize()
    return True


# Batches on the host that a GPU may still read, and the end of their copies, in the order of their begin.
_copies_under_way: deque[tuple[torch.cuda.Event, Batch]] = deque()
_TENSORS = ("images", "labels", "ids", "sample_keys", "valid")
