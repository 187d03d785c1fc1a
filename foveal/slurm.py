"""Slurm's environment variables, text formats and commands. No other module knows them.

A job is named as Slurm's commands name it: a task of an array is ``<array>_<task>``. Durations are in seconds.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from foveal.errors import LaunchError

_SCONTROL_TIMEOUT_SECONDS = 20.0
_DEFAULT_SIGNAL_LEAD_SECONDS = 60.0  # of --signal=NAME, without @N
# A job in one of these states may still have processes; in any other it has none (sacct's words, from scontrol).
_LIVE_JOB_STATES = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
}


class SlurmUnavailableError(Exception):
    """Slurm's command is missing here, or did not end in time."""


class SlurmAccountingSilentError(SlurmUnavailableError):
    """The accounting's command did not end in time; the controller may answer."""


# --- this process: environment variables ---


@dataclass(frozen=True, slots=True)
class SlurmTask:
    """The place of this process among the tasks of its Slurm step."""

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True, slots=True)
class SlurmArrayTask:
    """A task of a Slurm array: its id, the number of tasks, and the lowest and highest id."""

    task_id: int
    task_count: int
    min_task_id: int
    max_task_id: int


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The job of this process, as its environment states it. ``restart_count``: 0 at the job's first start."""

    job_id: str
    restart_count: int = 0
    cluster: str | None = None
    node_list: str | None = None
    name: str | None = None
    num_tasks: str | None = None


def read_env_int(name: str, default: str | None = None) -> int:
    """Return the integer in a launcher's variable. Raises: LaunchError if it is not an integer."""
    text = os.environ.get(name, default)
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"the launcher's {name} is {text!r}, which is not a number") from None


def in_slurm_step() -> bool:
    """Whether srun started this process or one of its parents. A batch script outside srun is in no step."""
    return "SLURM_STEP_ID" in os.environ


def is_child_of_srun() -> bool:
    """Whether srun started this process. torchrun's variables are then left over from an earlier torchrun."""
    try:
        return in_slurm_step() and Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "slurmstepd"
    except OSError:
        return False


def read_slurm_task() -> SlurmTask | None:
    """Return the place of this process in its step; None outside a step. Raises: LaunchError for a wrong variable."""
    if not in_slurm_step() or "SLURM_PROCID" not in os.environ:
        return None
    size = read_env_int("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return SlurmTask(read_env_int("SLURM_PROCID"), size, read_env_int("SLURM_LOCALID", "0"))


def read_slurm_launch_id() -> dict[str, str]:
    """Return what tells the step of this process from every other step: job, step and number of restarts."""
    variables = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID", "restart": "SLURM_RESTART_COUNT"}
    return {key: os.environ.get(variable, "0") for key, variable in variables.items()}


def read_slurm_array_task() -> SlurmArrayTask | None:
    """Return the Slurm array task of this process; None outside an array."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    return SlurmArrayTask(*(read_env_int(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "MAX")))


def read_slurm_job() -> SlurmJob | None:
    """Return the job of this process; None outside Slurm."""
    # One of an array's tasks has the array's number as SLURM_JOB_ID; a requeue of that number restarts every task.
    array, variables = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ
    job_id = f"{array}_{variables['SLURM_ARRAY_TASK_ID']}" if array else variables.get("SLURM_JOB_ID")
    if not job_id:
        return None
    return SlurmJob(
        job_id,
        slurm_restart_count(),
        cluster=variables.get("SLURM_CLUSTER_NAME"),
        node_list=variables.get("SLURM_JOB_NODELIST"),
        name=variables.get("SLURM_JOB_NAME"),
        num_tasks=variables.get("SLURM_NTASKS"),
    )


def slurm_job_tags() -> dict[str, str]:
    """Return the job of this process as tags of an attempt; empty outside Slurm."""
    if (job := read_slurm_job()) is None:
        return {}
    tags = {
        "slurm_job_id": job.job_id,
        "slurm_job_name": job.name,
        "slurm_job_nodelist": job.node_list,
        "slurm_restart_count": str(job.restart_count) if job.restart_count else None,
        "slurm_ntasks": job.num_tasks,
        "slurm_cluster_name": job.cluster,
    }
    return {name: value for name, value in tags.items() if value is not None}


def slurm_restart_count() -> int:
    """Return how often Slurm has restarted this job; 0 outside Slurm."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


def describe_slurm_task() -> str:
    """Return the variables that identify this task in a log, as ``NAME=value, NAME=value``; empty outside Slurm."""
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_RESTART_COUNT")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def current_node_name() -> str:
    """Return this node's name: Slurm's name under Slurm, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rank0_slurm_node() -> str:
    """Return the node of the step's first task; empty outside Slurm."""
    nodes = expand_node_list(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))
    return nodes[0] if nodes else ""


def slurm_nodes_by_rank(world_size: int) -> list[str]:
    """Return the node of each rank, for ranks that Slurm placed node by node; empty if unknown or outside Slurm."""
    nodes = expand_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    nodes_by_rank = [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)]
    return nodes_by_rank if len(nodes_by_rank) == world_size else []


def count_allocated_gpus() -> int:
    """Return the number of GPUs on this node that belong to the Slurm step of this process; 0 outside a step."""
    if not in_slurm_step():
        return 0
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")  # counts the step's GPUs on the node, also with --gpus-per-task
    if count.isdecimal():
        return int(count)
    return len(read_gpu_list("SLURM_STEP_GPUS") or read_gpu_list("SLURM_JOB_GPUS") or [])


def read_gpu_list(variable: str) -> list[str] | None:
    """Return the GPUs listed in an environment variable; None if the variable is not set."""
    text = os.environ.get(variable)
    return None if text is None else [gpu for gpu in text.split(",") if gpu.strip() not in {"", "-1", "NoDevFiles"}]


# --- text formats ---


def expand_node_list(node_list: str) -> list[str]:
    """Return every host of a node list: ``a[01-03,7],c`` gives a01, a02, a03, a7, c. Containers may lack scontrol."""
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        names = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            numbers = [""] if not ranges else [number for span in ranges.split(",") for number in _expand_range(span)]
            names = [f"{name}{text}{number}" for name in names for number in numbers] if text or ranges else names
        hosts += names
    return hosts


def _expand_range(span: str) -> list[str]:
    first, _, last = span.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):  # no numbers: the first name is all that is certain
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def parse_sbatch_time(text: str) -> float | None:
    """Return the seconds of a time as sbatch reads it, where a number alone is minutes; None if it has another form.

    Forms: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours[:minutes[:seconds]]``.
    """
    return _parse_time(text, 60)


def parse_scontrol_time(text: str) -> float | None:
    """Return the seconds of a time as scontrol prints it, where a number alone is seconds; None for UNLIMITED.

    Forms: ``[days-]hours:minutes:seconds``, ``seconds``, ``seconds sec``.
    """
    return _parse_time(re.sub(r"^(\d+) sec$", r"\1", text), 1)


def _parse_time(text: str, seconds_of_bare_number: int) -> float | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *fields = match.groups()
    numbers = [int(field) for field in fields if field is not None]
    units = (3600, 60, 1)
    if days is None:
        units = {1: (seconds_of_bare_number,), 2: (60, 1), 3: units}[len(numbers)]
    return float(86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False)))


@dataclass(frozen=True, slots=True)
class SbatchOptions:
    """The options of a script's #SBATCH lines by name (``ntasks_per_node``), a bare option as ``true``.

    A later option replaces an earlier one. ``other_words``: what is not of the form --name or --name=value.
    """

    values: Mapping[str, str]
    other_words: tuple[str, ...]

    @property
    def time_limit(self) -> float | None:
        """The seconds of --time; None without a limit."""
        return parse_sbatch_time(self.values.get("time", ""))

    @property
    def signal_lead(self) -> float | None:
        """The seconds from the signal of --signal to the end of the job; None without --signal."""
        if self.values.get("signal", "true") == "true":
            return None
        lead = self.values["signal"].partition("@")[2]
        return float(lead) if lead.isdecimal() else _DEFAULT_SIGNAL_LEAD_SECONDS


def parse_sbatch_options(script: str) -> SbatchOptions:
    """Return the options in the #SBATCH lines of a script's text."""
    lines = [line.removeprefix("#SBATCH") for line in script.splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in _split_words(line)]
    pairs = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
    values = {name.replace("-", "_"): value if equals else "true" for name, equals, value in pairs}
    return SbatchOptions(values, tuple(word for word in words if not word.startswith("--")))


def _split_words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote without its partner
        return line.split()


def _parse_key_values(line: str) -> dict[str, str]:
    """Parse ``Key=value Key=value``. The first value of a key counts: a quoted command may contain the same key."""
    return dict(reversed(re.findall(r"(\S+?)=(\S*)", line)))


# --- commands ---


@dataclass(frozen=True, slots=True)
class SlurmJobStatus:
    """A job as the controller describes it; a time is None without a limit or if it is unknown.

    ``planned_time`` runs from the start to the end that Slurm plans, which a preemption moves. ``job_id`` is Slurm's
    own number, also for a task of an array.
    """

    job_id: str
    state: str
    reason: str
    partition: str
    batch_script: str
    is_preempted: bool
    time_limit: float | None
    run_time: float | None
    planned_time: float | None
    nodes: str = ""
    restart_count: int = 0

    @property
    def is_running(self) -> bool:
        """Whether Slurm has not begun to end the job."""
        return self.state == "RUNNING"

    @property
    def is_pending(self) -> bool:
        """Whether the job waits in the queue."""
        return self.state == "PENDING"

    @property
    def has_processes(self) -> bool:
        """Whether the job may have a process."""
        return self.state in _LIVE_JOB_STATES

    @property
    def time_left(self) -> float | None:
        """Seconds until the job's time limit; None without a limit."""
        return None if self.time_limit is None or self.run_time is None else max(self.time_limit - self.run_time, 0.0)


@dataclass(frozen=True, slots=True)
class SlurmPartition:
    """Limits of a partition, in seconds and nodes; None without a limit. ``grace`` is the preemption grace time."""

    name: str
    longest: float | None
    default: float | None
    grace: float
    nodes: int
    preempt_mode: str = ""
    priority_tier: int = 0


@dataclass(frozen=True, slots=True)
class SlurmConfig:
    """The controller's settings. ``kill_wait``: seconds from SIGTERM to SIGKILL; ``preempt_type``: its plug-in."""

    kill_wait: float | None
    preempt_type: str
    cluster: str = ""


def _run_scontrol(*arguments: str, timeout_seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    return _run("scontrol", *arguments, timeout_seconds=timeout_seconds)


def _run(*command: str, timeout_seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    timeout = timeout_seconds or _SCONTROL_TIMEOUT_SECONDS
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:  # a container without scontrol, a controller without answer
        raise SlurmUnavailableError(str(error)) from None


def _scontrol_output(*arguments: str, timeout_seconds: float | None = None) -> str:
    """Return what scontrol prints; empty if it fails, is missing or does not end in time."""
    try:
        answer = _run_scontrol(*arguments, timeout_seconds=timeout_seconds)
    except SlurmUnavailableError:
        return ""
    return "" if answer.returncode else answer.stdout


def step_job_id() -> str | None:
    """Return the job of this process if srun started it; None outside a Slurm step."""
    job = read_slurm_job() if in_slurm_step() else None
    return job.job_id if job else None


def show_job(job_id: str, timeout_seconds: float | None = None) -> SlurmJobStatus | None:
    """Ask the controller for a job; None if it does not know. Raises: SlurmUnavailableError."""
    answer = _run_scontrol("show", "job", "--oneliner", job_id, timeout_seconds=timeout_seconds)
    row = _parse_key_values(answer.stdout) if answer.returncode == 0 else {}
    if not row.get("JobState"):
        return None
    return SlurmJobStatus(
        row.get("JobId", job_id),
        row["JobState"],
        row.get("Reason", ""),
        row.get("Partition", ""),
        row.get("Command", "the batch script"),
        row.get("PreemptTime", "None") != "None",
        parse_scontrol_time(row.get("TimeLimit", "")),
        parse_scontrol_time(row.get("RunTime", "")),
        _planned_time(row),
        row.get("NodeList", "").replace("(null)", ""),
        int(row.get("Restarts", "")) if row.get("Restarts", "").isdecimal() else 0,
    )


def show_job_or_end(job_id: str, timeout_seconds: float) -> SlurmJobStatus | None:
    """Return a job as the controller describes it, or of one that it has forgotten the state in the accounting.

    None if Slurm does not say. ``timeout_seconds``: of each of two commands. Raises: SlurmUnavailableError without an
    answer of the controller, its SlurmAccountingSilentError without one of the accounting.
    """
    if (job := show_job(job_id, timeout_seconds)) is not None:
        return job
    if shutil.which("sacct") is None:  # a cluster without accounting
        return None
    options = ["--allocations", "--noheader", "--parsable2", "--format=State,NodeList"]
    try:
        answer = _run("sacct", f"--jobs={job_id}", *options, timeout_seconds=timeout_seconds)
    except SlurmUnavailableError as error:
        raise SlurmAccountingSilentError(str(error)) from None
    # One line of each start: "CANCELLED by 0|node[1-2]".
    state, _, nodes = (answer.stdout.splitlines() or [""])[-1].partition("|")
    state = state.partition(" ")[0]
    if answer.returncode or not state or state in _LIVE_JOB_STATES:
        return None
    return SlurmJobStatus(job_id, state, "", "", "", False, None, None, None, nodes)


def _planned_time(row: Mapping[str, str]) -> float | None:
    try:  # both times are of one clock, the controller's
        return (datetime.fromisoformat(row["EndTime"]) - datetime.fromisoformat(row["StartTime"])).total_seconds()
    except (KeyError, ValueError):  # EndTime=Unknown: there is no limit
        return None


def show_step_job() -> SlurmJobStatus | None:
    """Ask the controller for the job of this process; None outside a Slurm step or without an answer."""
    job_id = step_job_id()
    try:
        return None if job_id is None else show_job(job_id)
    except SlurmUnavailableError:
        return None


def end_state_of_job(job_id: str) -> str | None:
    """Return the state of a job that has no process left; None if it may have some, or Slurm does not answer."""
    try:
        answer = _run_scontrol("show", "job", "--oneliner", job_id)
    except SlurmUnavailableError:
        return None
    if answer.returncode:
        return "forgotten by Slurm" if "Invalid job id" in answer.stderr else None
    state = _parse_key_values(answer.stdout).get("JobState")
    return state if state and state not in _LIVE_JOB_STATES else None


def read_batch_script(job_id: str) -> SbatchOptions:
    """Return the #SBATCH options of a submitted job's script; none without an answer. Options of sbatch are not there."""
    return parse_sbatch_options(_scontrol_output("write", "batch_script", job_id, "-"))


def requeue_job(job_id: str) -> str | None:
    """Requeue a job. Return the controller's refusal, None if it agreed. Raises: SlurmUnavailableError."""
    answer = _run_scontrol("requeue", job_id)
    return answer.stderr.strip() or f"scontrol ended with {answer.returncode}" if answer.returncode else None


def read_slurm_config(timeout_seconds: float | None = None) -> SlurmConfig:
    """Ask for the controller's settings; empty without an answer."""
    output = _scontrol_output("show", "config", timeout_seconds=timeout_seconds)
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in output.splitlines())}
    kill_wait = parse_scontrol_time(values.get("KillWait", ""))
    return SlurmConfig(kill_wait, values.get("PreemptType", ""), values.get("ClusterName", ""))


def list_slurm_partitions(timeout_seconds: float | None = None) -> list[SlurmPartition]:
    """Return Slurm's partitions, the default first; empty without Slurm or without an answer."""
    output = _scontrol_output("show", "partition", "--oneliner", timeout_seconds=timeout_seconds)
    rows = [row for row in map(_parse_key_values, output.splitlines()) if "PartitionName" in row]
    return [_parse_partition(row) for row in sorted(rows, key=lambda row: row.get("Default") != "YES")]


def _parse_partition(row: Mapping[str, str]) -> SlurmPartition:
    nodes, max_nodes = (row.get(name, "") for name in ("TotalNodes", "MaxNodes"))
    total, tier = (int(text) if text.isdecimal() else 0 for text in (nodes, row.get("PriorityTier", "")))
    return SlurmPartition(
        row["PartitionName"],
        parse_scontrol_time(row.get("MaxTime", "")),
        parse_scontrol_time(row.get("DefaultTime", "")),
        parse_scontrol_time(row.get("GraceTime", "")) or 0.0,
        min(total, int(max_nodes)) if max_nodes.isdecimal() else total,
        row.get("PreemptMode", ""),
        tier,
    )


def can_submit_jobs() -> bool:
    """Whether this machine has the commands that submit and start jobs."""
    return bool(shutil.which("sbatch") and shutil.which("srun"))


def cancel_jobs(job_ids: Iterable[str]) -> None:
    """Cancel submitted jobs."""
    subprocess.run(["scancel", *job_ids], check=False)
