"""What Slurm would allow: a partition's limits, where there is a Slurm, and what the job scripts ask of it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from foveal.errors import ConfigError

_SCONTROL_TIMEOUT_SECONDS = 10  # seconds for scontrol
JOB_SCRIPTS = {"pretrain": "slurm/pretrain_mae.sh", "distill": "slurm/distill.sh", "finetune": "slurm/finetune.sh"}


@dataclass(frozen=True, slots=True)
class SlurmPartition:
    """A partition's limits, in seconds and nodes; nothing where there is none.

    ``grace`` is what a preempted job gets.
    """

    name: str
    longest: float | None
    default: float | None
    grace: float
    nodes: int


@dataclass(frozen=True, slots=True)
class JobScriptRequest:
    """What a job script asks for: its time, and how long before its end it wants to be told; seconds."""

    script: str
    time_seconds: float | None
    notice_seconds: float | None


def list_slurm_partitions() -> list[SlurmPartition]:
    """Slurm's partitions, the default first; none where there is no Slurm, or it does not answer."""
    if shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "partition", "--oneliner"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = said.stdout.splitlines() if said.returncode == 0 else []
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    rows = [row for row in rows if "PartitionName" in row]
    return [_parse_partition(row) for row in sorted(rows, key=lambda row: row.get("Default") != "YES")]


def find_slurm_partition(name: str | None) -> SlurmPartition | None:
    """The partition of a name, or the default one. Raises: ConfigError for a name that Slurm does not have."""
    found = list_slurm_partitions()
    if name is None:
        return found[0] if found else None
    for each in found:
        if each.name == name:
            return each
    there = ", ".join(each.name for each in found) or "none that can be asked for here"
    raise ConfigError(f"--partition {name} does not exist; there are: {there}")


def read_job_script_request(stage: str) -> JobScriptRequest | None:
    """What the stage's job script asks for; nothing where it does not lie below the current folder."""
    script = Path(JOB_SCRIPTS[stage])
    if not script.is_file():
        return None
    header = " ".join(line for line in script.read_text().splitlines() if line.startswith("#SBATCH"))
    time, notice = re.search(r"--time=(\S+)", header), re.search(r"--signal=\S*@(\d+)", header)
    return JobScriptRequest(
        str(script), parse_slurm_time(time[1]) if time else None, float(notice[1]) if notice else None
    )


def _parse_partition(row: dict[str, str]) -> SlurmPartition:
    longest, nodes = parse_slurm_time(row.get("MaxTime", "")), row.get("TotalNodes", "0")
    most = row.get("MaxNodes", "UNLIMITED")
    return SlurmPartition(
        row["PartitionName"],
        longest,
        parse_slurm_time(row.get("DefaultTime", "")),
        float(row.get("GraceTime", "0") or 0),
        min(int(nodes), int(most)) if most.isdecimal() else int(nodes),
    )


def parse_slurm_time(text: str) -> float | None:
    """Slurm's ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours[:minutes[:seconds]]``; else nothing."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        return 86400.0 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600.0 * (first or 0) + 60 * (second or 0) + third
    return 60.0 * (first or 0) + (second or 0)
