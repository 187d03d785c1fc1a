"""The copy of a rank's chunks on the host, which a thread writes while training changes the originals."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveal.checkpoint.chunks import TensorChunk

_ALIGNMENT_BYTES = 64  # of a tensor's start in the buffer, for any dtype


def copy_to_host(chunks: Sequence[TensorChunk], buffer: Tensor | None = None) -> tuple[list[TensorChunk], Tensor]:
    """Copy the part of the chunks that this rank writes to the host; return the copies and the buffer that they share.

    ``buffer``: of earlier copies, which it overwrites. One that suffices is used again, so that a run needs no further
    memory after its first save; else a new one is allocated, pinned for a GPU. Waits for the device.
    """
    sources = [
        {part: value.detach()[slice(*chunk.relative_write_range)] for part, value in chunk.flat_views_by_part.items()}
        for chunk in chunks
    ]
    values = [value for tensors in sources for value in tensors.values()]
    devices = {value.device for value in values if value.is_cuda}
    size = sum(_aligned_size(value) for value in values)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=bool(devices))
    copies = []
    begin = 0
    for chunk, tensors in zip(chunks, sources, strict=True):
        copied = {}
        for part, value in tensors.items():
            copied[part] = buffer[begin : begin + value.nbytes].view(value.dtype)
            copied[part].copy_(value, non_blocking=True)
            begin += _aligned_size(value)
        first, last = chunk.relative_write_range
        copies.append(
            replace(
                chunk,
                flat_start=chunk.flat_start + first,
                flat_views_by_part=copied,
                relative_write_range=(0, last - first),
            )
        )
    for device in devices:
        torch.cuda.synchronize(device)
    return copies, buffer


def _aligned_size(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
