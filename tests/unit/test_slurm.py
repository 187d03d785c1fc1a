"""Slurm's variables, text formats and answers; a script stands in for scontrol."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foveal import slurm
from foveal.runs.job_lookup import JobLookup
from foveal.slurm import (
    SlurmAccountingSilentError,
    SlurmArrayTask,
    SlurmJob,
    SlurmPartition,
    SlurmUnavailableError,
    current_node_name,
    end_state_of_job,
    expand_node_list,
    is_child_of_srun,
    list_slurm_partitions,
    parse_sbatch_options,
    parse_sbatch_time,
    parse_scontrol_time,
    rank0_slurm_node,
    read_slurm_array_task,
    read_slurm_config,
    read_slurm_job,
    requeue_job,
    show_job,
    show_job_or_end,
    show_step_job,
    slurm_job_tags,
    slurm_nodes_by_rank,
    step_job_id,
)

Variables = Callable[..., None]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> Variables:
    """Set variables by name; those that the tests were started with are removed."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make scontrol the lines of a shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(script: str) -> None:
        file = tmp_path / "scontrol"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return write


# --- variables ---


def test_job_and_tags(variables: Variables) -> None:
    assert (read_slurm_job(), slurm_job_tags()) == (None, {})
    variables(SLURM_RESTART_COUNT="2", SLURM_NTASKS="4")
    assert slurm_job_tags() == {}, "variables that a user set are no job"
    variables(SLURM_JOB_ID="77")
    assert read_slurm_job() == SlurmJob("77", restart_count=2, num_tasks="4")
    assert slurm_job_tags() == {"slurm_job_id": "77", "slurm_restart_count": "2", "slurm_ntasks": "4"}
    variables(SLURM_RESTART_COUNT="0", SLURM_CLUSTER_NAME="one", SLURM_JOB_NODELIST="a[1-2]", SLURM_JOB_NAME="mae")
    assert slurm_job_tags() == {
        "slurm_job_id": "77",
        "slurm_job_name": "mae",
        "slurm_job_nodelist": "a[1-2]",
        "slurm_ntasks": "4",
        "slurm_cluster_name": "one",
    }


def test_an_array_task_is_named_by_array_and_number(variables: Variables) -> None:
    """SLURM_JOB_ID of one of the tasks is the array's own id."""
    assert read_slurm_array_task() is None
    variables(SLURM_JOB_ID="77", SLURM_ARRAY_JOB_ID="77")
    variables(SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_TASK_COUNT="5", SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_MAX="4")
    assert slurm_job_tags() == {"slurm_job_id": "77_4"}
    assert read_slurm_array_task() == SlurmArrayTask(task_id=4, task_count=5, min_task_id=0, max_task_id=4)


def test_a_batch_script_is_in_no_step(variables: Variables) -> None:
    variables(SLURM_JOB_ID="77")
    assert (step_job_id(), show_step_job(), is_child_of_srun()) == (None, None, False)
    variables(SLURM_STEP_ID="0")
    assert (step_job_id(), is_child_of_srun()) == ("77", False)


def test_slurms_name_of_the_node_counts(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    assert current_node_name() == "host"
    variables(SLURMD_NODENAME="node1")
    assert current_node_name() == "node1"


# --- formats ---


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu7", ["gpu7"]),
        ("gpu7,gpu9", ["gpu7", "gpu9"]),
        ("gpu[3-5]", ["gpu3", "gpu4", "gpu5"]),
        ("gpu[003-004,7],cpu1", ["gpu003", "gpu004", "gpu7", "cpu1"]),
        ("a[01-02,7]b,c", ["a01b", "a02b", "a7b", "c"]),
        ("rack[2-3]-node[04-05]", ["rack2-node04", "rack2-node05", "rack3-node04", "rack3-node05"]),
        ("node-a-1.cluster.org,node[2-3]", ["node-a-1.cluster.org", "node2", "node3"]),
        ("gpu[x-z]", ["gpux"]),  # no form of Slurm's: only the first host is certain
        ("", []),
    ],
)
def test_node_lists(text: str, hosts: list[str], variables: Variables) -> None:
    assert expand_node_list(text) == hosts
    variables(SLURM_JOB_NODELIST="elsewhere", SLURM_STEP_NODELIST=text)
    assert rank0_slurm_node() == (hosts[0] if hosts else "elsewhere")


def test_node_names_by_rank(variables: Variables) -> None:
    variables(SLURM_STEP_NODELIST="n[1-3]", SLURM_STEP_TASKS_PER_NODE="2(x2),1")
    assert slurm_nodes_by_rank(5) == ["n1", "n1", "n2", "n2", "n3"]
    assert slurm_nodes_by_rank(6) == []


@pytest.mark.parametrize(
    ("text", "as_sbatch", "as_scontrol"),
    [
        ("30", 1800, 30),  # minutes of --time, seconds of KillWait and GraceTime
        ("5 sec", None, 5),
        ("1:30", 90, 90),
        ("24:00:00", 86400, 86400),
        ("2-0", 172800, 172800),
        ("1-12", 129600, 129600),  # behind days come hours, in the text of either
        ("1-12:30", 131400, 131400),
        ("1-12:30:00", 131400, 131400),
        ("UNLIMITED", None, None),
        ("", None, None),
        ("1:2:3:4", None, None),
    ],
)
def test_times(text: str, as_sbatch: float | None, as_scontrol: float | None) -> None:
    assert (parse_sbatch_time(text), parse_scontrol_time(text)) == (as_sbatch, as_scontrol)


@pytest.mark.parametrize(
    ("lines", "time_limit", "lead"),
    [
        ("#SBATCH --time=24:00:00 --signal=USR1@180  # a comment with --signal=TERM@5", 86400, 180),
        ("#SBATCH --signal=USR1@180\n#SBATCH --signal=B:TERM@30 --time=10", 600, 30),  # the last counts
        ("#SBATCH --signal=USR1", None, 60),  # sbatch's own default
        ("#SBATCH --signal=R:USR1@90", None, 90),
        ('#SBATCH -N 2 --signal="USR1@90" --time=UNLIMITED', None, 90),
        ("#SBATCH --comment=don't --signal=USR1@90", None, 90),
        ("#SBATCH --requeue --signal", None, None),
        ("##SBATCH --time=5 --signal=USR1@90\necho --signal=USR1@90", None, None),
    ],
)
def test_the_lines_of_a_job_script(lines: str, time_limit: float | None, lead: float | None) -> None:
    options = parse_sbatch_options(f"#!/bin/bash\n{lines}\nexit 0\n")
    assert (options.time_limit, options.signal_lead) == (time_limit, lead)


def test_what_is_no_option_of_a_job_script_is_kept_apart() -> None:
    options = parse_sbatch_options("#SBATCH -N 2 --ntasks-per-node=8\n#SBATCH --requeue\n")
    assert (options.values, options.other_words) == ({"ntasks_per_node": "8", "requeue": "true"}, ("-N", "2"))


# --- scontrol ---

PARTITIONS = """\
cat <<'END'
PartitionName=long Default=NO DefaultTime=NONE GraceTime=0 MaxNodes=2 MaxTime=7-00:00:00 TotalNodes=9
PartitionName=short Default=YES DefaultTime=01:00:00 GraceTime=30 MaxNodes=UNLIMITED MaxTime=4:00:00 PriorityTier=5 PreemptMode=REQUEUE TotalNodes=9
END"""


def test_partitions_are_read_and_the_default_is_first(scontrol: Callable[[str], None]) -> None:
    scontrol(PARTITIONS)
    assert list_slurm_partitions() == [
        SlurmPartition("short", 14400, 3600, 30, 9, "REQUEUE", 5),
        SlurmPartition("long", 604800, None, 0, 2),
    ]


def test_a_partition_of_which_little_is_said_has_no_limits(scontrol: Callable[[str], None]) -> None:
    scontrol("echo PartitionName=one GraceTime=00:01:00 TotalNodes=many")
    assert list_slurm_partitions() == [SlurmPartition("one", None, None, 60, 0)]


def test_of_a_job_the_first_value_of_a_key_counts(scontrol: Callable[[str], None]) -> None:
    scontrol("echo JobId=77 JobState=RUNNING TimeLimit=UNLIMITED EndTime=Unknown Command=/x.sh JobState=FAILED")
    job = show_job("77")
    assert job is not None
    assert (job.state, job.batch_script, job.time_limit, job.planned_time) == ("RUNNING", "/x.sh", None, None)
    assert end_state_of_job("77") is None
    scontrol("echo JobId=77 JobState=NODE_FAIL JobState=RUNNING")
    assert end_state_of_job("77") == "NODE_FAIL"


def test_an_answer_with_a_failure_is_none(scontrol: Callable[[str], None]) -> None:
    scontrol("echo PartitionName=one JobId=77 JobState=FAILED KillWait = 5 sec; exit 1")
    assert (list_slurm_partitions(), show_job("77"), end_state_of_job("77")) == ([], None, None)
    assert read_slurm_config().kill_wait is None
    scontrol("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert (show_job("77"), end_state_of_job("77")) == (None, "forgotten by Slurm")
    scontrol("echo nothing")
    assert (list_slurm_partitions(), show_job("77"), end_state_of_job("77")) == ([], None, None)


@pytest.mark.parametrize("script", [None, "exec sleep 60"])
def test_without_an_answer_only_a_requeue_says_so(
    script: str | None, scontrol: Callable[[str], None], variables: Variables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_SCONTROL_TIMEOUT_SECONDS", 0.1)
    variables(SLURM_JOB_ID="77", SLURM_STEP_ID="0")
    if script is None:
        variables(PATH="/nowhere")
    else:
        scontrol(script)
    assert (list_slurm_partitions(), show_step_job(), end_state_of_job("77")) == ([], None, None)
    assert list_slurm_partitions(0.05) == []
    for ask in (show_job, requeue_job):
        with pytest.raises(SlurmUnavailableError, match="scontrol"):
            ask("77")


def test_a_job_that_the_controller_forgot_is_in_the_accounting(
    scontrol: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol(
        "echo 'JobId=77 JobState=PENDING Reason=Priority NodeList=(null) Restarts=2 TimeLimit=01:00:00 RunTime=00:10:00'"
    )
    job = show_job_or_end("77", 5.0)
    assert job is not None
    assert (job.is_pending, job.has_processes, job.reason, job.nodes, job.restart_count) == (
        True,
        False,
        "Priority",
        "",
        2,
    )
    assert job.time_left == 3000.0
    scontrol("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    sacct = tmp_path / "sacct"
    for script, state, nodes in (
        ("echo 'CANCELLED by 0|node[1-2]'", "CANCELLED", "node[1-2]"),
        ("echo 'TIMEOUT|node1'", "TIMEOUT", "node1"),
        ("exit 1", None, None),
        ("true", None, None),
        ("echo 'RUNNING|node1'", None, None),  # the accounting is late
    ):
        sacct.write_text(f"#!/bin/sh\n{script}\n")
        sacct.chmod(0o755)
        job = show_job_or_end("77", 5.0)
        assert (job and job.state, job and job.nodes) == (state, nodes)
    sacct.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(SlurmAccountingSilentError):
        show_job_or_end("77", 0.2)
    monkeypatch.setattr("foveal.runs.job_lookup._TIMEOUT_SECONDS", 0.5)
    jobs, begin = JobLookup(), time.monotonic()
    assert [jobs.find_by_id(str(job)) for job in range(77, 87)] == [None] * 10
    assert time.monotonic() - begin < 3.0  # the accounting is asked once
    scontrol("echo JobId=90 JobState=PENDING")
    assert (job := jobs.find_by_id("90")) is not None and job.is_pending
    sacct.unlink()
    scontrol("exec sleep 60")
    with pytest.raises(SlurmUnavailableError):
        show_job_or_end("77", 0.2)
