"""What a node says of itself: means since the last report, rates since the last sample, and no error that ends a run."""

import time
from types import SimpleNamespace

import psutil
import pytest
from clock import Clock

from foveal.training.meters import node_usage
from foveal.training.meters.node_usage import NodeMeter, NodeSample, NodeSampler, average_samples


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_SAMPLE_SECONDS", "_SAMPLE_SECONDS"):
        monkeypatch.setattr(node_usage, name, 0.001)


def wait_for_samples(meter: NodeMeter, count: int) -> None:
    end = time.monotonic() + 30
    while len(meter._samples) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_rates_are_those_since_the_sample_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, disk = Clock(), SimpleNamespace(read_bytes=10**6, write_bytes=5 * 10**6)
    links = {
        "lo": SimpleNamespace(bytes_recv=10**12, bytes_sent=10**12),
        "eth0": SimpleNamespace(bytes_recv=7 * 10**6, bytes_sent=0),
        "eth1": SimpleNamespace(bytes_recv=10**6, bytes_sent=0),
    }
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: disk)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: links)
    sampler = NodeSampler(clock)
    clock.now += 4.0
    disk.read_bytes += 8 * 10**6
    disk.write_bytes = 0  # a disk was taken away
    links["eth0"].bytes_recv += 2 * 10**6
    links["eth1"].bytes_recv += 2 * 10**6
    links["lo"].bytes_recv += 10**9
    sample = sampler()
    assert sample["disk_read_megabytes_per_second"] == pytest.approx(2.0)
    assert sample["disk_write_megabytes_per_second"] == 0.0
    assert sample["network_receive_megabytes_per_second"] == pytest.approx(1.0)
    assert sample["network_transmit_megabytes_per_second"] == 0.0


def test_a_sample_of_this_machine() -> None:
    sampler = NodeSampler()
    started = time.perf_counter()
    sample = sampler()
    assert time.perf_counter() - started < 1.0
    assert 0 < float(str(sample["system_memory_usage_percentage"])) < 100
    assert float(str(sample["cpu_utilization_percentage"])) >= 0


def test_means_are_those_of_the_samples_that_have_a_number() -> None:
    samples: list[NodeSample] = [
        {"cpu_utilization_percentage": 10.0, "gpu_utilization_percentage": [100.0, None]},
        {"cpu_utilization_percentage": 25.04, "gpu_utilization_percentage": [50.0, None]},
        {"cpu_utilization_percentage": None},
    ]
    assert average_samples(samples) == {"cpu_utilization_percentage": 17.5, "gpu_utilization_percentage": [75.0, None]}


def test_a_report_is_due_after_some_seconds_and_later_with_many_nodes() -> None:
    clock = Clock()
    meter = NodeMeter(lambda: lambda: {"cpu_utilization_percentage": 50.0}, clock)
    assert meter.pop(1) is None, "nothing is sampled yet"
    meter.start()
    wait_for_samples(meter, 2)
    assert meter.pop(1) == {"cpu_utilization_percentage": 50.0}
    for seconds, nodes, is_due in ((9.9, 1, False), (0.2, 1, True), (60.0, 128, False), (5.0, 128, True)):
        clock.now += seconds
        wait_for_samples(meter, 1)
        assert (meter.pop(nodes) is not None) == is_due, (seconds, nodes)
    meter.close()
    meter._thread.join(30)
    assert not meter._thread.is_alive()


def test_a_meter_that_nobody_asks_keeps_the_newest_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of runs writes no metrics of its own."""
    monkeypatch.setattr(node_usage, "_MAX_SAMPLES", 5)
    taken: list[float] = []
    meter = NodeMeter(lambda: lambda: taken.append(len(taken)) or {"cpu_utilization_percentage": taken[-1]})
    meter.start()
    end = time.monotonic() + 30
    while len(taken) < 20 and time.monotonic() < end:
        time.sleep(0.001)
    meter.close()
    meter._thread.join(30)
    assert [sample["cpu_utilization_percentage"] for sample in meter._samples] == taken[-5:]


def test_an_error_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> NodeSample:
        raise PermissionError("/proc/stat")

    meter = NodeMeter(lambda: fail)
    meter.start()
    meter._thread.join(30)
    assert meter.pop(1) is None
    (record,) = caplog.records
    assert "the use of this node is not recorded any more (PermissionError: /proc/stat)" in record.getMessage()
