"""How fast a run goes, and how much of the time it waits for data; both survive a restart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class ThroughputMeter:
    """Seconds of training, images per second, and the share of time spent waiting for the loader."""

    def __init__(self, prior_seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._before = prior_seconds
        self._start = self._last = clock()
        self._paused = 0.0
        self._waited = 0.0
        self._images = 0

    def start(self) -> None:
        """Training begins now: what came before, building models and engines, counts in nothing."""
        self._start = self._last = self._clock()
        self._paused = 0.0

    @property
    def training_seconds(self) -> float:
        """Seconds of training over all attempts: saving, showing and evaluating are not training."""
        return self._before + self._clock() - self._start - self._paused

    @contextmanager
    def time_data_wait(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Around what is not training; it counts in no rate."""
        start = self._clock()
        yield
        took = self._clock() - start
        self._paused += took
        self._last += took

    def add_images(self, images: int) -> None:
        """Images that a step took, over all ranks."""
        self._images += images

    def read_rates(self) -> dict[str, float]:
        """Rates since the last read: ``images_per_second`` over all ranks, ``data_wait`` in [0, 1]."""
        now = self._clock()
        span = max(now - self._last, 1e-9)
        rates = {"images_per_second": self._images / span, "data_wait": min(1.0, self._waited / span)}
        self._last, self._waited, self._images = now, 0.0, 0
        return rates


def measure_peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_gib``: the most that torch ever held on this rank's GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
