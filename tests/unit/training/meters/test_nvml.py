"""NVML's numbers of each GPU, and GPUs that tell only some of them."""

import ctypes
from typing import Any

import pytest
import torch

from foveal.training.meters import nvml
from foveal.training.meters.nvml import Nvml, open_nvml

NOT_SUPPORTED = 3


class FakeLibrary:
    """NVML's functions for some GPUs; the second one is a part of a GPU (MIG), which has no utilisation and no power."""

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus = num_gpus

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = self.num_gpus
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = 100 + index.value
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, rates: Any) -> int:
        rates._obj.gpu, rates._obj.memory = 93, 41
        return NOT_SUPPORTED if handle.value == 101 else 0

    def nvmlDeviceGetMemoryInfo(self, _handle: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 80_000_000_000, 60_000_000_000, 20_000_000_000
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, power: Any) -> int:
        power._obj.value = 350_500
        return NOT_SUPPORTED if handle.value == 101 else 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p, limit: Any) -> int:
        limit._obj.value = 701_000
        return NOT_SUPPORTED if handle.value == 101 else 0


def test_each_gpu_has_a_number_or_none() -> None:
    assert Nvml(FakeLibrary(2)).sample() == {
        "utilization_percentage": [93.0, None],
        "memory_usage_megabytes": [20_000.0, 20_000.0],
        "memory_usage_percentage": [25.0, 25.0],
        "power_usage_watts": [350.5, None],
        "power_usage_percentage": [50.0, None],
    }


def test_a_node_without_gpus_has_no_numbers() -> None:
    assert Nvml(FakeLibrary(0)).sample() == {}


def test_a_node_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", "libthat-is-nowhere.so.1")
    assert open_nvml() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu() -> None:
    device = open_nvml()
    assert device is not None
    held = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    sample = device.sample()
    assert len(sample["memory_usage_megabytes"]) >= torch.cuda.device_count()
    assert max(used or 0 for used in sample["memory_usage_megabytes"]) > held.nbytes / 1e6
    assert all(0 <= (percent or 0) <= 100 for percent in sample["utilization_percentage"])
    assert any(10 < (watts or 0) < 2000 for watts in sample["power_usage_watts"])
