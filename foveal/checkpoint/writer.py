"""What one rank does for a checkpoint while training goes on: host copies of its pieces, and a thread that writes them."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.checkpoint.chunks import TensorChunk

_ALIGNMENT_BYTES = 64  # bytes: where a run may begin, whatever its elements are


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What came of a thread's work: the sha256 of each file that it wrote, or the error that ended it."""

    checksums: dict[str, str]
    seconds: float
    error: Exception | None = None


class BackgroundWriter:
    """One rank's snapshot and its thread. There is one snapshot at a time: nothing is copied while the thread runs."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._work = WriteResult({}, 0.0)

    @property
    def is_writing(self) -> bool:
        """Whether the thread still works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout_seconds: float) -> None:
        """Wait until the thread is done, at most so long."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def snapshot(self, chunks: Sequence[TensorChunk]) -> list[TensorChunk]:
        """Copies on the host of what this rank writes of its pieces, valid until the next snapshot.

        They share one buffer that is allocated once, pinned where it is filled from a GPU: a training that has been
        saved once needs no memory that it has not already got.
        """
        assert not self.is_writing, "the thread reads the snapshot before"
        runs = [
            {part: value.detach()[slice(*piece.write_range)] for part, value in piece.tensors.items()}
            for piece in chunks
        ]
        values = [value for parts in runs for value in parts.values()]
        devices = {value.device for value in values if value.is_cuda}
        self._reserve_buffer(sum(_aligned_size(value) for value in values), pinned=bool(devices))
        copies, begin = [], 0
        for piece, parts in zip(chunks, runs, strict=True):
            copied = {}
            for part, value in parts.items():
                copied[part] = self._host[begin : begin + value.nbytes].view(value.dtype)
                copied[part].copy_(value, non_blocking=True)
                begin += _aligned_size(value)
            first, last = piece.write_range
            copies.append(replace(piece, start=piece.start + first, tensors=copied, write_range=(0, last - first)))
        for device in devices:
            torch.cuda.synchronize(device)
        return copies

    def start(self, write: Callable[[], dict[str, str]]) -> None:
        """Let the thread do ``write``, which returns the sha256 of each file that it wrote."""
        assert not self.is_writing, "one piece of work at a time"
        # A daemon: a disk that answers no more does not keep the process.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> WriteResult:
        """What came of the last work."""
        assert not self.is_writing, "the thread still works"
        return self._work

    def _run(self, write: Callable[[], dict[str, str]]) -> None:
        began = time.monotonic()
        try:
            self._work = WriteResult(write(), time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - it is told to all ranks between two steps, where it can be
            self._work = WriteResult({}, time.monotonic() - began, error)

    def _reserve_buffer(self, size: int, *, pinned: bool) -> None:
        if self._host.numel() < size or (pinned and not self._host.is_pinned()):
            self._host = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def count_bytes(chunks: Sequence[TensorChunk]) -> int:
    """How many bytes this rank writes of its pieces."""
    return sum(
        value.element_size() * (piece.write_range[1] - piece.write_range[0])
        for piece in chunks
        for value in piece.tensors.values()
    )


def _aligned_size(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
