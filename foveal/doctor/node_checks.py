"""Checks of a single node: device, matrix product rate, shared memory, limits. Each error becomes a reported fault."""

import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

from foveal.distributed.gpu_allocation import check_slurm_gpus
from foveal.distributed.launcher import LaunchEnv
from foveal.doctor.report import RankReport

SHM_FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory, no temporary file
_SHM_MIN_BYTES = 64e6  # Docker's default, with which NCCL fails at once
_SHM_GOOD_BYTES = 1e9  # always enough
_MIN_OPEN_FILES = 1024
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
    check_gpu_health(report, str(getattr(properties, "uuid", "")), device.index or 0)


def check_gpu_allocation(report: RankReport, launch_env: LaunchEnv) -> None:
    """Report GPUs without a rank. Raises: BadNodeError, LaunchError, as ``check_slurm_gpus``."""
    if idle := check_slurm_gpus(launch_env):
        report.add_fault("note", idle)


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


def check_open_file_limit(report: RankReport) -> None:
    """Check the number of files that a process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.facts["files"] = soft
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        report.add_fault(
            "config", f"a process may open {soft} files: set `ulimit -n {4 * _MIN_OPEN_FILES}` in the job script"
        )
