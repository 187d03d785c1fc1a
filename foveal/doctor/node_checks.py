"""Checks of a node by itself: its device, its rate, its memory for exchange, its limits. All errors are findings."""

import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

from foveal.distributed.gpu_allocation import check_gpus
from foveal.distributed.launcher import Seat
from foveal.doctor.report import Report

SHM = Path("/dev/shm")  # noqa: S108 - the place itself is what is looked at
_SHM_LEAST, _SHM_GOOD = 64e6, 1e9  # bytes: Docker's default, with which NCCL fails at once; what never is too little
_FILES_LEAST = 1024
_BUSY = 0.9  # share of a GPU's memory that must be free before anything starts
_SIDES = {"cuda": 8192, "cpu": 512}  # of the square matrices that are multiplied
_SECONDS = 0.6  # for each type
_ROUND = 0.03  # seconds of one measurement: long against a clock, short against a disturbance
_ASKED = ("index", "uuid", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active", "temperature.gpu")
# nvidia-smi's bits that slow a GPU down against its owner's will; idle and a power cap are ordinary.
_SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
_SLOWDOWNS |= {0x80: "hardware power brake"}


def device(report: Report, where: torch.device) -> None:
    """Name and memory, and what nvidia-smi knows of errors and slowdowns."""
    if where.type != "cuda":
        report.facts |= {"device": "cpu"}
        return
    about = torch.cuda.get_device_properties(where)
    free, total = torch.cuda.mem_get_info(where)
    report.facts |= {"device": about.name, "gpu_bytes": total}
    if free < _BUSY * total:
        report.fault(
            "node",
            f"{(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB of GPU {where.index} are taken before anything has started: "
            f"another process holds them",
        )
    health(report, str(getattr(about, "uuid", "")), where.index or 0)


def gpus(report: Report, here: Seat) -> None:
    """The GPUs that Slurm gave, as torch sees them and the ranks use them. Errors: those of ``check_gpus``."""
    if idle := check_gpus(here):
        report.fault("note", idle)


def health(report: Report, uuid: str, index: int) -> None:
    """ECC errors and slowdowns of one GPU, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        report.fault("node", f"nvidia-smi fails ({(said.stderr or said.stdout).strip().splitlines()[-1]})")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(_ASKED)]
    mine = next((row for row in rows if uuid and uuid in row[1]), None)
    mine = mine or next((row for row in rows if row[0] == str(index)), None)
    if mine is None:
        return
    _, _, errors, reasons, warmth = mine
    report.facts["celsius"] = warmth
    if errors.isdecimal() and int(errors):
        report.fault("node", f"GPU {index} counts {errors} uncorrected memory errors: it must be reset or replaced")
    active = int(reasons, 16) if reasons.lower().startswith("0x") else 0
    slow = [name for bit, name in _SLOWDOWNS.items() if active & bit]
    if slow:
        report.fault("node", f"GPU {index} is throttled at {warmth} degrees ({', '.join(slow)})")


def rates(report: Report, where: torch.device) -> None:
    """Operations a second of matrix products, as the median of short measurements, for bf16 and fp32."""
    side = _SIDES[where.type]
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(side, side, device=where).to(kind) for _ in range(2))
        report.facts[f"{name}_rate"] = 2 * side**3 / _product_seconds(left, right)


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    def took(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right)
        if left.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    took(1)
    count = max(1, round(_ROUND / took(1)))
    deadline, taken = time.perf_counter() + _SECONDS, [took(count)]
    while time.perf_counter() < deadline:
        taken.append(took(count))
    return statistics.median(taken)


def shared_memory(report: Report) -> None:
    """Room in /dev/shm, which NCCL and gloo exchange through."""
    if not SHM.is_dir():
        report.fault("note", f"there is no {SHM}: NCCL needs one (containers: --shm-size=8g)")
        return
    usage = shutil.disk_usage(SHM)
    report.facts |= {"shm_free": usage.free}
    if usage.free < _SHM_LEAST:
        report.fault(
            "node",
            f"{SHM} has {usage.free / 1e6:.0f} MB free of {usage.total / 1e6:.0f}: NCCL would fail; remove what is left there, "
            f"or start containers with --shm-size=8g",
        )
    elif usage.free < _SHM_GOOD:
        report.fault("note", f"{SHM} has {usage.free / 1e6:.0f} MB free, which may be little for NCCL")


def limits(report: Report) -> None:
    """How many files a process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.facts["files"] = soft
    if soft != resource.RLIM_INFINITY and soft < _FILES_LEAST:
        report.fault("config", f"a process may open {soft} files: set `ulimit -n {4 * _FILES_LEAST}` in the job script")
