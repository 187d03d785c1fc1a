"""Use of a node's NVIDIA GPUs, read from NVML, the library that comes with NVIDIA's driver.

Functions and structs are those of nvml.h (NVML API reference). No Python package is needed: where the driver is, the
library is. Every function returns 0, or the number of an error.
"""

import ctypes
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))  # percent of the last sampling period


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))  # bytes


class Nvml:
    """The GPUs that NVML shows on this node, in NVML's order."""

    def __init__(self, library: Any) -> None:
        """``library``: the functions of NVML, initialised."""
        self._library = library
        count = ctypes.c_uint()
        self._handles: list[ctypes.c_void_p] = []
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            for index in range(count.value):
                handle = ctypes.c_void_p()
                if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                    self._handles.append(handle)

    def sample(self) -> dict[str, list[float | None]]:
        """Return by metric one number of each GPU; None for a number that a GPU does not tell, such as a MIG part."""
        columns: dict[str, list[float | None]] = {}
        for handle in self._handles:
            for name, value in self._sample_gpu(handle).items():
                columns.setdefault(name, []).append(value)
        return columns

    def _sample_gpu(self, handle: ctypes.c_void_p) -> dict[str, float | None]:
        utilization, memory = _Utilization(), _Memory()
        power, power_limit = ctypes.c_uint(), ctypes.c_uint()  # milliwatts
        library = self._library
        has_utilization = library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)) == 0
        has_memory = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 and memory.total > 0
        has_power = library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(power)) == 0
        has_limit = library.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(power_limit)) == 0
        return {
            "utilization_percentage": float(utilization.gpu) if has_utilization else None,
            "memory_usage_megabytes": memory.used / 1e6 if has_memory else None,
            "memory_usage_percentage": 100 * memory.used / memory.total if has_memory else None,
            "power_usage_watts": power.value / 1000 if has_power else None,
            "power_usage_percentage": 100 * power.value / power_limit.value
            if has_power and has_limit and power_limit.value
            else None,
        }


def open_nvml() -> Nvml | None:
    """Load and initialise NVML; None on a node without NVIDIA's driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        is_ready = library.nvmlInit_v2() == 0
    except (OSError, AttributeError):
        return None
    return Nvml(library) if is_ready else None
