"""Which rank the others wait for: what each does by itself in a step, before a collective makes all equally slow.

A step takes as long on every rank, because its collectives do: only the time before the first of them tells ranks apart.
So two spans are taken: a rank's own fetch of the data (not the wait until the others have theirs), and its forwards, which
come before the gradients are reduced. On a GPU the forwards are timed by events in the device's own queue; on a CPU by the
clock.

It sees: slow storage, slow decoding, a processor that is throttled or shared, a GPU that runs at half its clock.
It does not see: a slow network (which all ranks wait for), backward passes and updates (they hold the reductions; a device
that is slow in the forward is slow there too), and single steps: the numbers are means since the last report. Under ZeRO 3
and FSDP the forward fetches weights from other ranks, and a slow rank's time is spread over all: there the fetch of the
data still tells.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from foveal.training.meters.metric_accumulator import MetricRow


class StragglerMeter:
    """A rank's own seconds since the last report. ``host`` is what the table calls its node."""

    def __init__(self, device: torch.device, host: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._host = host
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._fetched = self._worked = 0.0
        self._steps = 0

    @contextmanager
    def time_data_fetch(self) -> Iterator[None]:
        """Around this rank's own fetch of a step's data; a step begins with it."""
        start = self._clock()
        yield
        self._fetched += self._clock() - start
        self._steps += 1

    @contextmanager
    def time_forward(self) -> Iterator[None]:
        """Around a forward."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = self._clock()
            yield
            self._worked += self._clock() - start

    def report(self, step: int, gather: Callable[[Any], list[Any]]) -> tuple[MetricRow, list[dict[str, Any]]]:
        """Numbers for the row of ``step``, and the table of all ranks; on every rank. One small gather; call it
        where the device's queue has been waited for already, as after reading the losses.

        The row: ``slowest_rank``, ``slowest_step_seconds`` and ``median_step_seconds`` over the ranks, and
        ``slowest_data_wait``, the largest share of its own time that a rank spent on fetching, in [0, 1]. Nothing of a
        single rank, or before a step.
        """
        for begin, end in self._events:
            end.synchronize()
            self._worked += begin.elapsed_time(end) / 1000
        steps, own = max(self._steps, 1), self._fetched + self._worked
        mine = {"host": self._host, "step_seconds": own / steps, "data_wait": self._fetched / own if own else 0.0}
        self._events, self._fetched, self._worked, self._steps = [], 0.0, 0.0, 0
        table = [{"step": step, "rank": rank} | each for rank, each in enumerate(gather(mine))]
        seconds = [each["step_seconds"] for each in table]
        if len(table) == 1 or not any(seconds):
            return {}, []
        numbers = {
            "slowest_rank": float(seconds.index(max(seconds))),
            "slowest_step_seconds": max(seconds),
            "median_step_seconds": statistics.median(seconds),
            "slowest_data_wait": max(each["data_wait"] for each in table),
        }
        return numbers, table
