"""A rank's background writing of a checkpoint: host copies of its chunks, and a thread that writes them."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveal.checkpoint.chunks import TensorChunk

_ALIGNMENT_BYTES = 64  # of a tensor's start in the host buffer, for any dtype


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """The sha256 of each file that a rank wrote, and the bytes of all of them on disk."""

    checksums: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of a writing thread: its files, or the error that ended the thread."""

    files: WrittenFiles = WrittenFiles()
    seconds: float = 0.0
    error: Exception | None = None


class BackgroundWriter:
    """A rank's snapshot and writing thread. There is a single snapshot: nothing is copied while the thread runs."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._result = WriteResult()

    @property
    def is_writing(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout_seconds: float) -> None:
        """Wait for the thread, at most ``timeout_seconds``."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def copy_to_host_buffer(self, chunks: Sequence[TensorChunk]) -> list[TensorChunk]:
        """Copy this rank's part of the chunks to the host; the copies are valid until the next snapshot.

        The copies share a buffer that is allocated once, pinned for a GPU: after its first save a run needs no further
        memory.
        """
        assert not self.is_writing, "the thread reads the previous snapshot"
        sources = [
            {
                part: value.detach()[slice(*chunk.relative_write_range)]
                for part, value in chunk.flat_views_by_part.items()
            }
            for chunk in chunks
        ]
        values = [value for tensors in sources for value in tensors.values()]
        devices = {value.device for value in values if value.is_cuda}
        self._reserve_buffer(sum(_aligned_size(value) for value in values), pinned=bool(devices))
        copies = []
        begin = 0
        for chunk, tensors in zip(chunks, sources, strict=True):
            copied = {}
            for part, value in tensors.items():
                copied[part] = self._buffer[begin : begin + value.nbytes].view(value.dtype)
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
        return copies

    def start(self, write: Callable[[], WrittenFiles]) -> None:
        """Run ``write`` in a thread."""
        assert not self.is_writing, "the previous thread is running"
        # A daemon thread: a disk that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> WriteResult:
        """Return the result of the last thread."""
        assert not self.is_writing, "the thread is running"
        return self._result

    def _run(self, write: Callable[[], WrittenFiles]) -> None:
        started_at = time.monotonic()
        try:
            self._result = WriteResult(write(), time.monotonic() - started_at)
        except Exception as error:  # noqa: BLE001 - commit raises or logs it on all ranks between two steps
            self._result = WriteResult(WrittenFiles(), time.monotonic() - started_at, error)

    def _reserve_buffer(self, size: int, *, pinned: bool) -> None:
        if self._buffer.numel() < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer first
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def count_bytes_to_write(chunks: Sequence[TensorChunk]) -> int:
    """Return the number of bytes that this rank writes of its chunks."""
    return sum(
        value.element_size() * (chunk.relative_write_range[1] - chunk.relative_write_range[0])
        for chunk in chunks
        for value in chunk.flat_views_by_part.values()
    )


def count_bytes_of_all_ranks(chunks: Sequence[TensorChunk]) -> int:
    """Return the number of bytes that all ranks write together, from the chunks of any rank."""
    return sum(
        math.prod(chunk.shape) * sum(value.element_size() for value in chunk.flat_views_by_part.values())
        for chunk in chunks
    )


def _aligned_size(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
