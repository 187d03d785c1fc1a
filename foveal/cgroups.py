"""What the cgroups above this process allow it, as containers and Slurm's steps have them: memory and processors."""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_FILE_CACHE = ("inactive_file", "active_file")  # given back when needed
_TOTAL_FILE_CACHE = ("total_inactive_file", "total_active_file")


def read_memory_left() -> int | None:
    """Return the bytes that the closest limit leaves; None without a limit."""
    left = []
    for group, is_v2 in _groups("memory"):
        limit, usage = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        try:
            free = int((group / limit).read_text()) - int((group / usage).read_text())
            counts = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max", or a path outside this container
            continue
        own, hierarchical = (
            sum(int(counts.get(name, 0)) for name in names) for names in (_FILE_CACHE, _TOTAL_FILE_CACHE)
        )
        left.append(free + max(own, hierarchical))
    return min(left, default=None)


def read_cpu_limit() -> float | None:
    """Return the processors' worth of time that the closest quota allows all processes of its group; None without."""
    limits = []
    for group, is_v2 in _groups("cpu"):
        try:
            if is_v2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            limits.append(int(quota) / int(period))
        except (OSError, ValueError):  # "max", or a path outside this container
            continue
    return min((limit for limit in limits if limit > 0), default=None)  # -1: no quota of version 1


def count_usable_cores() -> int:
    """Return the cores that this process may use at once: those it may run on, within the quota of its group."""
    num_cores, limit = len(os.sched_getaffinity(0)), read_cpu_limit()
    return num_cores if limit is None else max(1, min(num_cores, int(limit)))


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the groups above this process that may limit it, and whether they are of version 2."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT
        folder = root / path.strip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(root))):
            yield group, not controllers
