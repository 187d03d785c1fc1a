"""Slurm's limits: those of a partition, from scontrol, and the requests of the job scripts."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from foveal.errors import ConfigError

_SCONTROL_TIMEOUT_SECONDS = 10
JOB_SCRIPTS = {"pretrain": "slurm/pretrain_mae.sh", "distill": "slurm/distill.sh", "finetune": "slurm/finetune.sh"}


@dataclass(frozen=True, slots=True)
class SlurmPartition:
    """Limits of a partition, in seconds and nodes; None without a limit. ``grace`` is the preemption grace time."""

    name: str
    longest: float | None
    default: float | None
    grace: float
    nodes: int


@dataclass(frozen=True, slots=True)
class JobScriptTimes:
    """A job script's --time, and the notice of its --signal before the end, in seconds."""

    script: str
    time_limit_seconds: float | None
    notice_seconds: float | None


def list_slurm_partitions() -> list[SlurmPartition]:
    """Return Slurm's partitions, the default first; empty without Slurm, or if scontrol fails."""
    if shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "partition", "--oneliner"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    rows = [row for row in rows if "PartitionName" in row]
    return [_parse_partition(row) for row in sorted(rows, key=lambda row: row.get("Default") != "YES")]


def find_slurm_partition(name: str | None) -> SlurmPartition | None:
    """Return a partition by name, or the default partition. Raises: ConfigError if it does not exist."""
    partitions = list_slurm_partitions()
    if name is None:
        return partitions[0] if partitions else None
    for partition in partitions:
        if partition.name == name:
            return partition
    names = ", ".join(partition.name for partition in partitions) or "none, scontrol lists no partitions"
    raise ConfigError(f"--partition {name} does not exist; there are: {names}")


def read_job_script_times(stage: str) -> JobScriptTimes | None:
    """Return the request of the stage's job script; None if it is not below the current folder."""
    script = Path(JOB_SCRIPTS[stage])
    if not script.is_file():
        return None
    header = " ".join(line for line in script.read_text().splitlines() if line.startswith("#SBATCH"))
    time, notice = re.search(r"--time=(\S+)", header), re.search(r"--signal=\S*@(\d+)", header)
    return JobScriptTimes(
        str(script), slurm_time_to_seconds(time[1]) if time else None, float(notice[1]) if notice else None
    )


def _parse_partition(row: dict[str, str]) -> SlurmPartition:
    longest, nodes = slurm_time_to_seconds(row.get("MaxTime", "")), row.get("TotalNodes", "0")
    max_nodes = row.get("MaxNodes", "UNLIMITED")
    return SlurmPartition(
        row["PartitionName"],
        longest,
        slurm_time_to_seconds(row.get("DefaultTime", "")),
        float(row.get("GraceTime", "0") or 0),
        min(int(nodes), int(max_nodes)) if max_nodes.isdecimal() else int(nodes),
    )


def slurm_time_to_seconds(text: str) -> float | None:
    """Return the seconds of a Slurm time, None if it has another form.

    Forms: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours[:minutes[:seconds]]``.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        return 86400.0 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600.0 * (first or 0) + 60 * (second or 0) + third
    return 60.0 * (first or 0) + (second or 0)
