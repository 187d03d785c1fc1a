"""The machine that a table was made on, in words: no host name, no path."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def described(packages: Sequence[str]) -> str:
    """Processor, cores, memory, Python and the versions of ``packages``; those that are not installed are left out."""
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
    return f"{processor}, {cores} cores, {memory:.0f} GiB of memory, {platform.system()}; {', '.join(versions)}"
