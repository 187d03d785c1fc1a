"""The machine that a table was made on, in words: no host name, no path."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def described(packages: Sequence[str]) -> str:
    """Processor, cores, memory, GPUs, Python and the versions of ``packages``; those not installed are left out."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = names[0] if names else platform.machine()
    card = f" one of {torch.cuda.device_count()} {torch.cuda.get_device_name()};" if torch.cuda.is_available() else ""
    return f"{processor}, {cores} cores, {memory:.0f} GiB of memory, {platform.system()};{card} {', '.join(versions)}"
