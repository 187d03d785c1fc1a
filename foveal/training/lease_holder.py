"""The process that makes an attempt at a run, and whether it is alive as far as another host can tell."""

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveal.slurm import SlurmJob, end_state_of_job


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """The process of rank 0 in an attempt, and its Slurm job if it has one."""

    host: str
    pid: int
    born: str  # distinguishes the process from a later one, or one of another container, with the same pid
    ranks: int
    job: str | None = None
    restart: int = 0
    cluster: str | None = None
    nodes: str | None = None

    def __str__(self) -> str:
        job = f"job {self.job} " if self.job else ""
        return f"{job}on {self.host}, rank 0 pid {self.pid}"


def current_holder(world_size: int, job: SlurmJob | None = None) -> LeaseHolder:
    """Return this process as a holder; ``job``: its Slurm job, None outside Slurm."""
    holder = LeaseHolder(socket.gethostname(), os.getpid(), _process_identity(os.getpid()) or "", world_size)
    if not job:
        return holder
    return replace(holder, job=job.job_id, restart=job.restart_count, cluster=job.cluster, nodes=job.node_list)


def parse_holder(facts: dict[str, Any]) -> LeaseHolder | None:
    """Return the holder in the content of an attempt's file; None if the file holds something else."""
    try:
        holder = LeaseHolder(**{name: value for name, value in facts.items() if name != "time"})
    except TypeError:
        return None
    numbers, texts = (holder.pid, holder.ranks, holder.restart), (holder.host, holder.born)
    is_whole = all(type(number) is int for number in numbers) and all(isinstance(text, str) for text in texts)
    return holder if is_whole else None


def number_or_none(value: Any) -> Any:
    """Return a number of a record of an attempt; None for anything else."""
    return value if type(value) in (int, float) else None


def get_liveness_and_reason(previous: LeaseHolder, current: LeaseHolder) -> tuple[bool | None, str]:
    """Return whether ``previous`` is alive, and if not, the reason; None: this host cannot tell."""
    job = f"job {previous.job}"
    if (
        previous.job is not None
        and (previous.job, previous.cluster) == (current.job, current.cluster)
        and previous.restart < current.restart
    ):
        return False, f"Slurm has started {job} again"
    if (is_alive := is_alive_here(previous, current)) is not None:
        return is_alive, "" if is_alive else f"process {previous.pid} is gone"
    if (
        previous.job is not None
        and previous.cluster == current.cluster
        and (state := end_state_of_job(previous.job)) is not None
    ):
        return False, f"{job} is {state}"
    return None, ""


def is_alive_here(previous: LeaseHolder, current: LeaseHolder) -> bool | None:
    """Return whether the process of ``previous`` is alive on this host; None if it was on another. Slurm is not asked."""
    # The same boot of the same host and the same pid namespace: pids are comparable.
    if previous.host != current.host or previous.born.split()[:-1] != current.born.split()[:-1]:
        return None
    return _process_identity(previous.pid) == previous.born


def _process_identity(pid: int) -> str | None:
    """Identify a process among all that ever ran: boot id, pid namespace, start time in ticks since boot.

    None: no such process, or a zombie.
    """
    try:
        # After the name in parentheses, which may hold any character: field 0 is the state, field 19 the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "XZ" else f"{boot} {Path('/proc/self/ns/pid').readlink()} {fields[19]}"
    except OSError:
        return None
