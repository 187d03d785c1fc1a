"""Straggler detection: the time that each rank spends in a step before a collective makes all ranks equally slow.

A step takes equally long on every rank because of its collectives; only the time before the first collective differs
between ranks. Two durations are measured: a rank's own data fetch (without the wait for the other ranks' fetches) and
its forwards, which precede the reduction of gradients. On a GPU, events in the device's queue time the forwards; on a
CPU, the clock does.

Visible: slow storage, slow decoding, a throttled or shared processor, a GPU at half its clock.
Not visible: a slow network (all ranks wait for it), backward passes and updates (they contain the reductions; a device
that is slow there is slow in the forward too), and single steps (metrics are means since the last report). Under ZeRO 3
and FSDP the forward gathers weights from other ranks, which spreads a slow rank's time over all ranks: only the data
fetch identifies a rank there.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from foveal.training.meters.metric_accumulator import MetricRow

# Rows of a report: with a row for each of a thousand ranks the file grew by 100 KB a report.
_MAX_TABLE_ROWS = 16


class StragglerMeter:
    """A rank's own seconds since the last report. ``host``: name of the node in the table."""

    def __init__(self, device: torch.device, host: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._host = host
        self._clock = clock
        self._is_cuda = device.type == "cuda"
        self._forward_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._fetch_seconds = self._forward_seconds = 0.0
        self._num_steps = 0

    @contextmanager
    def time_data_fetch(self) -> Iterator[None]:
        """Time this rank's own fetch of a step's data."""
        start = self._clock()
        yield
        self._fetch_seconds += self._clock() - start

    @contextmanager
    def time_forward(self) -> Iterator[None]:
        """Time a forward."""
        if self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._forward_events.append((begin, end))
        else:
            start = self._clock()
            yield
            self._forward_seconds += self._clock() - start

    def add_step(self) -> None:
        """Count a step."""
        self._num_steps += 1

    def pop_metrics_and_table(
        self, step: int, gather: Callable[[Any], list[Any]]
    ) -> tuple[MetricRow, list[dict[str, Any]]]:
        """Return the metrics of the row of ``step`` and a table of the slowest ranks, on every rank, and reset the meter.

        The table has at most 16 rows, by rank. One small gather. Call it after a synchronisation with the device, such as reading the losses.
        The metrics: ``slowest_rank``, ``slowest_step_seconds`` and ``median_step_seconds`` over the ranks, and
        ``slowest_data_wait``, the largest fraction of its own time that a rank spent on fetching, in [0, 1]. Both are
        empty for a single rank and before the first step.
        """
        for begin, end in self._forward_events:
            end.synchronize()
            self._forward_seconds += begin.elapsed_time(end) / 1000
        num_steps, own_seconds = max(self._num_steps, 1), self._fetch_seconds + self._forward_seconds
        record = {
            "host": self._host,
            "step_seconds": own_seconds / num_steps,
            "data_wait": self._fetch_seconds / own_seconds if own_seconds else 0.0,
        }
        self._forward_events, self._fetch_seconds, self._forward_seconds, self._num_steps = [], 0.0, 0.0, 0
        table = [{"step": step, "rank": rank} | rank_record for rank, rank_record in enumerate(gather(record))]
        step_seconds = [row["step_seconds"] for row in table]
        if len(table) == 1 or not any(step_seconds):
            return {}, []
        metrics = {
            "slowest_rank": float(step_seconds.index(max(step_seconds))),
            "slowest_step_seconds": max(step_seconds),
            "median_step_seconds": statistics.median(step_seconds),
            "slowest_data_wait": max(row["data_wait"] for row in table),
        }
        slowest = sorted(table, key=lambda row: -row["step_seconds"])[:_MAX_TABLE_ROWS]
        return metrics, sorted(slowest, key=lambda row: row["rank"])
