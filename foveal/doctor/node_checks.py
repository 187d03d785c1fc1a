"""Checks of a single node: device, matrix product rate, shared memory, limits. Each error becomes a reported fault."""

import os
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from foveal.distributed.gpu_allocation import check_slurm_gpus, find_hidden_gpus, read_gpu_uuid
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.open_files import OPEN_FILES_REMEDY, count_files_needed, read_open_file_limit
from foveal.distributed.preflight import is_infiniband_disabled
from foveal.doctor.report import RankReport
from foveal.slurm import slurm_nodes_by_rank

SHM_FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory, no temporary file
_SHM_MIN_BYTES = 64e6  # Docker's default, with which NCCL fails at once
_SHM_GOOD_BYTES = 1e9  # always enough
INFINIBAND_FOLDER = Path("/sys/class/infiniband")
_LOCKED_MIN_BYTES = 64 << 20  # the default of many systems, 8 MiB, fails at the first registration
_LOCKED_GOOD_BYTES = 1 << 30
PCI_FOLDER = Path("/sys/bus/pci/devices")
_MIN_FREE_FRACTION = 0.9  # of a GPU's memory, before training starts
_MATMUL_SIZES = {"cuda": 8192, "cpu": 512}  # side of the square matrices
_SECONDS_PER_DTYPE = 0.6
_MEASUREMENT_SECONDS = 0.03  # of one measurement: long compared with the clock's resolution, short with a disturbance
_NVIDIA_SMI_FIELDS = (
    "index",
    "uuid",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
)
# Bits of nvidia-smi for unwanted slowdowns; idle clocks and a power cap are ordinary and left out.
_SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
_SLOWDOWNS |= {0x80: "hardware power brake"}


def check_device(report: RankReport, device: torch.device) -> None:
    """Report the device's name, memory, and the errors and slowdowns that nvidia-smi lists."""
    if device.type != "cuda":
        report.facts |= {"device": "cpu"}
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    report.facts |= {"device": properties.name, "gpu_bytes": total}
    if free < _MIN_FREE_FRACTION * total:
        report.add_fault(
            "node",
            f"{(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB of GPU {device.index} are in use before training "
            f"starts: another process holds them",
        )
    report.facts["gpu_uuid"] = read_gpu_uuid(device)
    check_gpu_health(report, str(getattr(properties, "uuid", "")), device.index or 0)
    check_cpu_affinity(report, _format_pci_address(properties))


def check_gpu_allocation(report: RankReport, launch_env: LaunchEnv) -> None:
    """Report GPUs without a rank, and GPUs that ranks hide from one another.

    Raises: BadNodeError, LaunchError, as ``check_slurm_gpus``.
    """
    for sentence in (check_slurm_gpus(launch_env), find_hidden_gpus(launch_env)):
        if sentence:
            report.add_fault("note", sentence)


def check_gpu_health(report: RankReport, uuid: str, index: int) -> None:
    """Report uncorrected memory errors and slowdowns of one GPU, as listed by nvidia-smi, if that is installed."""
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        report.add_fault("node", f"nvidia-smi fails ({(done.stderr or done.stdout).strip().splitlines()[-1]})")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(_NVIDIA_SMI_FIELDS)]
    gpu = next((row for row in rows if uuid and uuid in row[1]), None)
    gpu = gpu or next((row for row in rows if row[0] == str(index)), None)
    if gpu is None:
        return
    _, _, errors, throttle_reasons, temperature = gpu
    report.facts["celsius"] = temperature
    if errors.isdecimal() and int(errors):
        report.add_fault("node", f"GPU {index} counts {errors} uncorrected memory errors: it must be reset or replaced")
    active_bits = int(throttle_reasons, 16) if throttle_reasons.lower().startswith("0x") else 0
    slowdowns = [name for bit, name in _SLOWDOWNS.items() if active_bits & bit]
    if slowdowns:
        report.add_fault("node", f"GPU {index} is throttled at {temperature} degrees ({', '.join(slowdowns)})")


def measure_matmul_rates(report: RankReport, device: torch.device) -> None:
    """Measure the rate of matrix products in bf16 and fp32, in operations per second."""
    side = _MATMUL_SIZES[device.type]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        report.facts[f"{name}_rate"] = 2 * side**3 / _time_matmul(a, b)


def _time_matmul(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the seconds of one product, as the median of short measurements."""

    def measure(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    measure(1)  # warm-up
    count = max(1, round(_MEASUREMENT_SECONDS / measure(1)))
    deadline, durations = time.perf_counter() + _SECONDS_PER_DTYPE, [measure(count)]
    while time.perf_counter() < deadline:
        durations.append(measure(count))
    return statistics.median(durations)


def check_shared_memory(report: RankReport) -> None:
    """Check the free space in /dev/shm, through which NCCL and gloo exchange data."""
    if not SHM_FOLDER.is_dir():
        report.add_fault("note", f"there is no {SHM_FOLDER}: NCCL needs one (containers: --shm-size=8g)")
        return
    usage = shutil.disk_usage(SHM_FOLDER)
    report.facts |= {"shm_free": usage.free}
    if usage.free < _SHM_MIN_BYTES:
        report.add_fault(
            "node",
            f"{SHM_FOLDER} has {usage.free / 1e6:.0f} MB free of {usage.total / 1e6:.0f}: NCCL would fail; "
            f"remove leftover files there, or start containers with --shm-size=8g",
        )
    elif usage.free < _SHM_GOOD_BYTES:
        report.add_fault("note", f"{SHM_FOLDER} has {usage.free / 1e6:.0f} MB free, which may be little for NCCL")


def check_limits(report: RankReport, world_size: int) -> None:
    """Check the limits of a process that ``ulimit`` shows."""
    check_open_file_limit(report, world_size)
    check_locked_memory_limit(report, world_size)


def check_open_file_limit(report: RankReport, world_size: int) -> None:
    """Check the number of files that a process may open: any node may be that of rank 0 at the next start."""
    limit, needed = read_open_file_limit(), count_files_needed(world_size)
    report.facts["files"] = limit
    if 0 <= limit < needed:
        report.add_fault(
            "config", f"a process may open {limit} files, and {world_size} ranks need {needed}: {OPEN_FILES_REMEDY}"
        )


def check_locked_memory_limit(report: RankReport, world_size: int) -> None:
    """Check that InfiniBand may register memory, where several nodes use it. NCCL's error would blame the network."""
    nodes = set(slurm_nodes_by_rank(world_size))
    is_used = len(nodes) > 1 and not is_infiniband_disabled()
    if not is_used or not INFINIBAND_FOLDER.is_dir() or not any(INFINIBAND_FOLDER.iterdir()):
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < _LOCKED_GOOD_BYTES:
        report.add_fault(
            "config" if limit < _LOCKED_MIN_BYTES else "note",
            f"a process may lock {limit >> 20} MiB of memory (`ulimit -l`), and InfiniBand registers more: submit with "
            f"--propagate=NOFILE,CORE if the login node set this, or LimitMEMLOCK=infinity of slurmd",
        )


def check_cpu_affinity(report: RankReport, pci_address: str) -> None:
    """Compare the CPUs of this rank with those next to its GPU, which share memory and PCI lanes with it."""
    file = PCI_FOLDER / pci_address / "local_cpulist"
    if not file.exists():
        return
    local, own = _parse_cpu_list(file.read_text()), os.sched_getaffinity(0)
    if local and not local & own:
        report.add_fault(
            "note",
            f"rank {report.rank} has no CPU next to its GPU {pci_address} ({file.read_text().strip()}): copies cross "
            f"sockets; start with --distribution=block:block, and bind ranks in the order of the GPUs",
        )


def _parse_cpu_list(text: str) -> set[int]:
    """Return the CPUs of a list such as ``0-3,8``."""
    spans = [span.partition("-") for span in text.strip().split(",") if span]
    return {cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)}


def _format_pci_address(properties: Any) -> str:
    """Return the address of a GPU under /sys as ``0000:17:00.0``; empty if torch does not state it."""
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    if not all(hasattr(properties, name) for name in names):
        return ""
    domain, bus, slot = (getattr(properties, name) for name in names)
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
