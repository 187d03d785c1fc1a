"""What one rank does for a checkpoint while training goes on: host copies of its pieces, and a thread that writes them."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.checkpoint.chunks import Piece

_ALIGNED = 64  # bytes: where a run may begin, whatever its elements are


@dataclass(frozen=True, slots=True)
class Work:
    """What came of a thread's work: the sha256 of each file that it wrote, or the error that ended it."""

    sums: dict[str, str]
    seconds: float
    error: Exception | None = None


class Writer:
    """One rank's snapshot and its thread. There is one snapshot at a time: nothing is copied while the thread runs."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._work = Work({}, 0.0)

    @property
    def busy(self) -> bool:
        """Whether the thread still works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait until the thread is done, at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def snapshot(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies on the host of what this rank writes of its pieces, valid until the next snapshot.

        They share one buffer that is allocated once, pinned where it is filled from a GPU: a training that has been
        saved once needs no memory that it has not already got.
        """
        assert not self.busy, "the thread reads the snapshot before"
        runs = [{part: value.detach()[slice(*piece.writes)] for part, value in piece.parts.items()} for piece in pieces]
        values = [value for parts in runs for value in parts.values()]
        devices = {value.device for value in values if value.is_cuda}
        self._hold(sum(_room(value) for value in values), pinned=bool(devices))
        copies, begin = [], 0
        for piece, parts in zip(pieces, runs, strict=True):
            copied = {}
            for part, value in parts.items():
                copied[part] = self._host[begin : begin + value.nbytes].view(value.dtype)
                copied[part].copy_(value, non_blocking=True)
                begin += _room(value)
            first, last = piece.writes
            copies.append(replace(piece, start=piece.start + first, parts=copied, writes=(0, last - first)))
        for device in devices:
            torch.cuda.synchronize(device)
        return copies

    def begin(self, write: Callable[[], dict[str, str]]) -> None:
        """Let the thread do ``write``, which returns the sha256 of each file that it wrote."""
        assert not self.busy, "one piece of work at a time"
        # A daemon: a disk that answers no more does not keep the process.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> Work:
        """What came of the last work."""
        assert not self.busy, "the thread still works"
        return self._work

    def _run(self, write: Callable[[], dict[str, str]]) -> None:
        began = time.monotonic()
        try:
            self._work = Work(write(), time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - it is told to all ranks between two steps, where it can be
            self._work = Work({}, time.monotonic() - began, error)

    def _hold(self, size: int, *, pinned: bool) -> None:
        if self._host.numel() < size or (pinned and not self._host.is_pinned()):
            self._host = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def bytes_of(pieces: Sequence[Piece]) -> int:
    """How many bytes this rank writes of its pieces."""
    return sum(
        value.element_size() * (piece.writes[1] - piece.writes[0]) for piece in pieces for value in piece.parts.values()
    )


def _room(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNED) * _ALIGNED
