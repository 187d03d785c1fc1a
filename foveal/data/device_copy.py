"""Copies of a step's microbatches to the device: on a GPU in a stream of their own, one ahead of its use."""

from collections.abc import Callable, Iterator, Sequence

import torch

from foveal.data.batch import Batch


class CopyStream:
    """A CUDA stream for copies from pinned memory, beside the stream in which the calling thread computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start_copy(self, batch: Batch) -> Callable[[], Batch]:
        """Queue the copies of a batch. The returned function gives the batch on the device, for use from then on.

        The function makes the compute stream wait for the copies, not the host.
        """
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def finish() -> Batch:
            compute_stream = torch.cuda.current_stream(self._device)
            compute_stream.wait_event(copied)
            for tensor in moved.tensors().values():
                # The memory is the copies' stream's, which would reuse it while the device still computes with it.
                tensor.record_stream(compute_stream)
            return moved

        return finish


def open_copy_stream(device: torch.device) -> CopyStream | None:
    """Return a stream for copies to a GPU; None for a CPU, where nothing is copied."""
    return CopyStream(device) if device.type == "cuda" else None


class DeviceBatches:
    """The microbatches of a step on the device, in order, once.

    With a stream the first copy begins at once, and every other one before the microbatch ahead of it is used, so that
    two microbatches are on the device. Without a stream a microbatch is moved when it is used.
    """

    def __init__(self, host_batches: Sequence[Batch], device: torch.device, stream: CopyStream | None) -> None:
        self._device = device
        self._stream = stream
        self._remaining = iter(host_batches)
        self._finish_copy = self._start_next()

    def __iter__(self) -> Iterator[Batch]:
        while (finish := self._finish_copy) is not None:
            self._finish_copy = self._start_next()
            yield finish()

    def _start_next(self) -> Callable[[], Batch] | None:
        """Start the copy of the next microbatch; return the function that finishes it, None after the last."""
        batch = next(self._remaining, None)
        if batch is None:
            return None
        if self._stream is None:
            return lambda: batch.to(self._device, non_blocking=True)
        return self._stream.start_copy(batch)
