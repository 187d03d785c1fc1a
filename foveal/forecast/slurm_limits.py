"""Limits of a job: those of its partition, and the requests of its job script."""

from dataclasses import dataclass
from pathlib import Path

from foveal.errors import ConfigError
from foveal.slurm import SlurmPartition, list_slurm_partitions, parse_sbatch_options

_ANSWER_TIMEOUT_SECONDS = 10.0
JOB_SCRIPTS = {"pretrain": "slurm/pretrain_mae.sh", "distill": "slurm/distill.sh", "finetune": "slurm/finetune.sh"}


@dataclass(frozen=True, slots=True)
class JobScriptTimes:
    """A job script's --time, and the notice of its --signal before the end, in seconds."""

    script: str
    time_limit_seconds: float | None
    notice_seconds: float | None


def find_slurm_partition(name: str | None) -> SlurmPartition | None:
    """Return a partition by name, or the default partition. Raises: ConfigError if it does not exist."""
    partitions = list_slurm_partitions(_ANSWER_TIMEOUT_SECONDS)
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
    options = parse_sbatch_options(script.read_text())
    return JobScriptTimes(str(script), options.time_limit, options.signal_lead)
