"""Copies to the device beside its computation: the order of what is queued, with streams that only record it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from foveal.data.batch import Batch
from foveal.data.device_copy import CopyStream, DeviceBatches, open_copy_stream

CPU = torch.device("cpu")


def make_batch(number: int, *, with_targets: bool = False) -> Batch:
    ids = torch.arange(2) + 2 * number
    images = torch.full((2, 1, 4, 4), number, dtype=torch.uint8)
    batch = Batch(images, ids, ids, ids, torch.ones(2, dtype=torch.bool), step=0, epoch=0, microbatch_index=number)
    return replace(batch, targets=torch.ones(2, 3)) if with_targets else batch


class RecordedStream(CopyStream):
    """A stream that records when a copy of which microbatch begins and ends."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def start_copy(self, batch: Batch) -> Callable[[], Batch]:
        self._log.append(f"start {batch.microbatch_index}")

        def finish() -> Batch:
            self._log.append(f"finish {batch.microbatch_index}")
            return batch

        return finish


def test_a_copy_starts_before_the_microbatch_ahead_of_it_is_used() -> None:
    log: list[str] = []
    batches = DeviceBatches([make_batch(number) for number in range(3)], CPU, RecordedStream(log))
    assert log == ["start 0"], "the first copy begins before the ranks agree on the step"
    log.extend(f"use {batch.microbatch_index}" for batch in batches)
    assert log == [
        *("start 0", "start 1", "finish 0", "use 0"),
        *("start 2", "finish 1", "use 1"),
        *("finish 2", "use 2"),
    ]


def test_on_a_cpu_the_host_tensors_are_used_and_none_is_touched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_copy_stream(CPU) is None
    host, moved = [make_batch(0), make_batch(1)], []
    move = Batch.to

    def record_move(batch: Batch, device: torch.device, non_blocking: bool = False) -> Batch:
        moved.append(batch.microbatch_index)
        return move(batch, device, non_blocking)

    monkeypatch.setattr(Batch, "to", record_move)
    batches = DeviceBatches(host, CPU, None)
    assert moved == []
    used = []
    for batch in batches:
        used.append(batch)
        assert len(moved) == len(used), "one at a time, when it is used"
    assert all(
        value is before
        for batch, unmoved in zip(used, host, strict=True)
        for value, before in zip(batch.tensors().values(), unmoved.tensors().values(), strict=True)
    )


def test_the_compute_stream_waits_and_the_memory_is_kept_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        name = "copies"

        def __init__(self, device: torch.device | None = None) -> None:
            assert device == CPU

        def record_event(self) -> str:
            log.append(f"event in {self.name}")
            return "copied"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    class Compute(Stream):
        name = "compute"

    @contextmanager
    def enter(stream: Stream) -> Iterator[None]:
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", Compute)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"kept for {stream.name}"))
    finish = CopyStream(CPU).start_copy(make_batch(0, with_targets=True))
    assert log == ["enter copies", "event in copies", "leave copies"], "nothing waits yet"
    log.clear()
    assert finish().images.shape == (2, 1, 4, 4)
    assert log == ["compute waits for copied", *["kept for compute"] * 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_with_complete_copies_in_any_order_of_queues() -> None:
    """Many large microbatches, each used under a long queue: a copy that is late, or memory reused early, shows."""
    device, size = torch.device("cuda"), 1 << 24
    images = [torch.full((1, 1, 1, size), number, dtype=torch.uint8, pin_memory=True) for number in range(1, 17)]
    batches = [replace(make_batch(number), images=values) for number, values in enumerate(images)]
    load = torch.ones(4096, 4096, device=device)
    sums = []
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # the host waits for no copy
        try:
            for batch in DeviceBatches(batches, device, open_copy_stream(device)):
                for _ in range(5):
                    load = (load @ load).clamp(0, 1)
                sums.append(batch.images.sum(dtype=torch.int64) + load[0, 0].long() - load[0, 0].long())
                del batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [int(total) for total in sums] == [number * size for number in range(1, 17)]
