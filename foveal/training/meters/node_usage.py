"""Use of a node: processors, memory, disks, network and GPUs, sampled by a thread, never on the step's path.

The metrics have the names that MLflow gives to system metrics (mlflow.system_metrics); rates of disks and network are
ours. All are the whole node's: those of other jobs on it too.
"""

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from foveal.training.meters.nvml import open_nvml

NodeSample = Mapping[str, float | list[float | None] | None]  # a list has one number for each GPU; None: not told

_FIRST_SAMPLE_SECONDS = 1.0  # so that a run of some seconds has one
_SAMPLE_SECONDS = 2.0
_MAX_SAMPLES = 1800  # an hour's; a run of runs or of probes may never report
_REPORT_SECONDS = 10.0  # at least, between two reports of a node
_REPORT_SECONDS_PER_NODE = 0.5  # a thousand ranks write some 100 MB a day, and not ten times as much

_log = logging.getLogger(__name__)


class NodeSampler:
    """Samples this node. Rates are those since the sample before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import psutil  # here, in the thread: a run goes on without it

        self._psutil, self._clock = psutil, clock
        self._nvml = open_nvml()
        self._psutil.cpu_percent()  # the first call has nothing to compare with
        self._bytes_before, self._sampled_at = self._count_bytes(), clock()

    def __call__(self) -> NodeSample:
        """Return a sample: megabytes are 10**6 bytes, rates are per second."""
        memory, num_bytes, now = self._psutil.virtual_memory(), self._count_bytes(), self._clock()
        seconds = max(now - self._sampled_at, 1e-3)
        sample: dict[str, float | list[float | None] | None] = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
        }
        for name, count in num_bytes.items():
            # A counter that a lost device made smaller is no negative rate.
            moved = max(count - self._bytes_before.get(name, count), 0)
            sample[f"{name}_megabytes_per_second"] = moved / 1e6 / seconds
        self._bytes_before, self._sampled_at = num_bytes, now
        for name, values in ({} if self._nvml is None else self._nvml.sample()).items():
            sample[f"gpu_{name}"] = values
        return sample

    def _count_bytes(self) -> dict[str, int]:
        """Return the bytes that the node has moved since its start; the loopback interface is not counted."""
        counts: dict[str, int] = {}
        interfaces = [counters for name, counters in self._psutil.net_io_counters(pernic=True).items() if name != "lo"]
        if interfaces:
            counts["network_receive"] = sum(counters.bytes_recv for counters in interfaces)
            counts["network_transmit"] = sum(counters.bytes_sent for counters in interfaces)
        if (disks := self._psutil.disk_io_counters()) is not None:  # a container may see none
            counts |= {"disk_read": disks.read_bytes, "disk_write": disks.write_bytes}
        return counts


class NodeMeter:
    """The mean of this node's samples since its last report."""

    def __init__(
        self,
        make_sampler: Callable[[], Callable[[], NodeSample]] = NodeSampler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_sampler, self._clock = make_sampler, clock
        self._samples: deque[NodeSample] = deque(maxlen=_MAX_SAMPLES)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._reported_at = -math.inf
        self._thread = threading.Thread(target=self._work, name="node-meter", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def pop(self, num_nodes: int) -> NodeSample | None:
        """Return the mean of the samples since the last report, and reset the meter; None if a report is not due.

        A report is due ten seconds after the last one, and later with ``num_nodes`` above twenty. Nothing is waited for.
        """
        interval = max(_REPORT_SECONDS, _REPORT_SECONDS_PER_NODE * num_nodes)
        if not self._samples or self._clock() - self._reported_at < interval:
            return None
        self._reported_at = self._clock()
        with self._lock:
            samples = list(self._samples)
            self._samples.clear()
        return average_samples(samples)

    def close(self) -> None:
        """Sample no more. The thread is not waited for."""
        self._closed.set()

    def _work(self) -> None:
        """Sample until closed. An error ends the samples, never the run."""
        try:
            sampler = self._make_sampler()
            self._closed.wait(_FIRST_SAMPLE_SECONDS)
            while not self._closed.is_set():
                sample = sampler()
                with self._lock:
                    self._samples.append(sample)
                self._closed.wait(_SAMPLE_SECONDS)
        except Exception as error:  # noqa: BLE001 - what a node says of itself may not end a run
            _log.warning("the use of this node is not recorded any more (%s: %s)", type(error).__name__, error)


def average_samples(samples: list[NodeSample]) -> NodeSample:
    """Return the mean of each metric over the samples that have it, rounded to a tenth; GPU by GPU."""
    means: dict[str, float | list[float | None] | None] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values: list[Any] = [sample[name] for sample in samples if name in sample]
        if isinstance(values[0], list):
            means[name] = [_mean(column) for column in zip(*values, strict=False)]
        else:
            means[name] = _mean(values)
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return round(statistics.fmean(told), 1) if told else None
