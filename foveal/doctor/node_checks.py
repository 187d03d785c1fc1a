"""Checks of a node by itself: its device, its rate, its memory for exchange, its limits. All errors are findings."""

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

SHM_FOLDER = Path("/dev/shm")  # noqa: S108 - the place itself is what is looked at
_SHM_MIN_BYTES, _SHM_GOOD_BYTES = (
    64e6,
    1e9,
)  # bytes: Docker's default, with which NCCL fails at once; what never is too little
_MIN_OPEN_FILES = 1024
_MIN_FREE_FRACTION = 0.9  # share of a GPU's memory that must be free before anything starts
_MATMUL_SIZES = {"cuda": 8192, "cpu": 512}  # of the square matrices that are multiplied
_SECONDS_PER_DTYPE = 0.6  # for each type
_MEASUREMENT_SECONDS = 0.03  # seconds of one measurement: long against a clock, short against a disturbance
_NVIDIA_SMI_FIELDS = (
    "index",
    "uuid",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
)
# nvidia-smi's bits that slow a GPU down against its owner's will; idle and a power cap are ordinary.
_SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
_SLOWDOWNS |= {0x80: "hardware power brake"}


def check_device(report: RankReport, device: torch.device) -> None:
    """Name and memory, and what nvidia-smi knows of errors and slowdowns."""
    if device.type != "cuda":
        report.facts |= {"device": "cpu"}
        return
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    report.facts |= {"device": about.name, "gpu_bytes": total}
    if free < _MIN_FREE_FRACTION * total:
        report.add_fault(
            "node",
            f"{(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB of GPU {device.index} are taken before anything has started: "
            f"another process holds them",
        )
    check_gpu_health(report, str(getattr(about, "uuid", "")), device.index or 0)


def check_gpu_allocation(report: RankReport, launch_env: LaunchEnv) -> None:
    """The GPUs that Slurm gave, as torch sees them and the ranks use them. Raises: those of ``check_gpus``."""
    if idle := check_slurm_gpus(launch_env):
        report.add_fault("note", idle)


def check_gpu_health(report: RankReport, uuid: str, index: int) -> None:
    """ECC errors and slowdowns of one GPU, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        report.add_fault("node", f"nvidia-smi fails ({(said.stderr or said.stdout).strip().splitlines()[-1]})")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(_NVIDIA_SMI_FIELDS)]
    mine = next((row for row in rows if uuid and uuid in row[1]), None)
    mine = mine or next((row for row in rows if row[0] == str(index)), None)
    if mine is None:
        return
    _, _, errors, reasons, warmth = mine
    report.facts["celsius"] = warmth
    if errors.isdecimal() and int(errors):
        report.add_fault("node", f"GPU {index} counts {errors} uncorrected memory errors: it must be reset or replaced")
    active = int(reasons, 16) if reasons.lower().startswith("0x") else 0
    slow = [name for bit, name in _SLOWDOWNS.items() if active & bit]
    if slow:
        report.add_fault("node", f"GPU {index} is throttled at {warmth} degrees ({', '.join(slow)})")


def measure_matmul_rates(report: RankReport, device: torch.device) -> None:
    """Operations a second of matrix products, as the median of short measurements, for bf16 and fp32."""
    side = _MATMUL_SIZES[device.type]
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        report.facts[f"{name}_rate"] = 2 * side**3 / _time_matmul(left, right)


def _time_matmul(left: torch.Tensor, right: torch.Tensor) -> float:
    def took(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right)
        if left.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    took(1)
    count = max(1, round(_MEASUREMENT_SECONDS / took(1)))
    deadline, taken = time.perf_counter() + _SECONDS_PER_DTYPE, [took(count)]
    while time.perf_counter() < deadline:
        taken.append(took(count))
    return statistics.median(taken)


def check_shared_memory(report: RankReport) -> None:
    """Room in /dev/shm, which NCCL and gloo exchange through."""
    if not SHM_FOLDER.is_dir():
        report.add_fault("note", f"there is no {SHM_FOLDER}: NCCL needs one (containers: --shm-size=8g)")
        return
    usage = shutil.disk_usage(SHM_FOLDER)
    report.facts |= {"shm_free": usage.free}
    if usage.free < _SHM_MIN_BYTES:
        report.add_fault(
            "node",
            f"{SHM_FOLDER} has {usage.free / 1e6:.0f} MB free of {usage.total / 1e6:.0f}: NCCL would fail; remove what is left there, "
            f"or start containers with --shm-size=8g",
        )
    elif usage.free < _SHM_GOOD_BYTES:
        report.add_fault("note", f"{SHM_FOLDER} has {usage.free / 1e6:.0f} MB free, which may be little for NCCL")


def check_open_file_limit(report: RankReport) -> None:
    """How many files a process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.facts["files"] = soft
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        report.add_fault(
            "config", f"a process may open {soft} files: set `ulimit -n {4 * _MIN_OPEN_FILES}` in the job script"
        )
