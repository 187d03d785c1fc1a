"""Throughput and the fraction of time spent waiting for data, without pauses and across restarts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class ThroughputMeter:
    """Measures seconds of training, images per second, and the fraction of time spent waiting for the loader."""

    def __init__(self, prior_seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._prior_seconds = prior_seconds
        self._start = self._last_read = clock()
        self._paused_seconds = 0.0
        self._wait_seconds = 0.0
        self._images = 0

    def start(self) -> None:
        """Start the clock of training; building models and engines before it does not count."""
        self._start = self._last_read = self._clock()
        self._paused_seconds = 0.0

    @property
    def training_seconds(self) -> float:
        """Seconds of training over all attempts, without saving, rendering and evaluating."""
        return self._prior_seconds + self._clock() - self._start - self._paused_seconds

    @contextmanager
    def time_data_wait(self) -> Iterator[None]:
        """Time the wait for the next batch."""
        start = self._clock()
        yield
        self._wait_seconds += self._clock() - start

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Exclude a block that is not training from all rates."""
        start = self._clock()
        yield
        elapsed = self._clock() - start
        self._paused_seconds += elapsed
        self._last_read += elapsed

    def add_images(self, num_images: int) -> None:
        """Count the images of a step, over all ranks."""
        self._images += num_images

    @property
    def window_seconds(self) -> float:
        """Seconds of training since ``pop_rates``, over which ``read_rates`` averages."""
        return self._clock() - self._last_read

    def read_rates(self) -> dict[str, float]:
        """Return the rates since ``pop_rates``: ``images_per_second`` over all ranks, ``data_wait`` in [0, 1]."""
        elapsed = max(self.window_seconds, 1e-9)
        return {
            "images_per_second": self._images / elapsed,
            "data_wait": min(1.0, self._wait_seconds / elapsed),
        }

    def pop_rates(self) -> dict[str, float]:
        """Return the rates since the last call and begin anew."""
        rates = self.read_rates()
        self._last_read, self._wait_seconds, self._images = self._clock(), 0.0, 0
        return rates


def measure_peak_memory(device: torch.device) -> dict[str, float]:
    """Return ``peak_memory_gib``, torch's peak allocation on this rank's GPU since the start; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
