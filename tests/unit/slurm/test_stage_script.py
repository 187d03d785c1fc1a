"""What slurm/stage.sh makes of start after start. Slurm's commands are stand-ins that say what the real ones were seen to say."""

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from foveal.slurm import parse_sbatch_options

ROOT = Path(__file__).resolve().parents[3]
SRUN = '#!/bin/sh\ncat "$0.says" >&2\nexit $(cat "$0.code")\n'
PYTHON = '#!/bin/sh\n[ ! -e "$0.says" ] || { cat "$0.says" >&2; exit 127; }\n'
SCONTROL = """\
#!/bin/sh
case "$1" in
    show) cat "$0.job";;
    ping) echo "Slurmctld(primary) at here is UP";;
    *) echo "$@" >> "$0.calls";;
esac
"""
SCANCEL = '#!/bin/sh\necho scancel "$@" >> "$(dirname "$0")/scontrol.calls"\n'
RUNNING = (
    "JobId=77 JobName=x JobState=RUNNING Reason=None Restarts={restart} PreemptTime=None ExcNodeList=(null) Command=x"
)


def died(node: str, code: int, *said: str) -> str:
    """What srun passes on and adds when task 1 fails; the others are killed."""
    ends = [f"srun: error: {node}: task 1: Exited with exit code {code}", "srun: error: node1: task 0: Terminated"]
    return "".join(f"{line}\n" for line in (*said, *ends))


@dataclass
class Job:
    """A job of two nodes whose starts are played one by one."""

    folder: Path
    starts: int = 0

    def start(self, code: int, said: str, job: str = RUNNING, **environment: str) -> tuple[str, list[str]]:
        """The lines of the next start that begin with "foveal: exit", joined, and what was asked of Slurm."""
        tools = self.folder / "bin"
        (tools / "srun.code").write_text(str(code))
        (tools / "srun.says").write_text(said)
        (tools / "scontrol.job").write_text(job.format(restart=self.starts))
        (tools / "scontrol.calls").unlink(missing_ok=True)
        facts = {
            "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(self.starts), "SLURM_NTASKS": "2", "SLURMD_NODENAME": "node1",
            "SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "main",
            "FOVEAL_PREFLIGHT": "0", "FOVEAL_PAUSES": "0 0", "PATH": f"{tools}:{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "slurm/pretrain_mae.sh"], cwd=self.folder, env=facts | environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        self.starts += 1
        calls = tools / "scontrol.calls"
        ours = "\n".join(line for line in done.stderr.splitlines() if line.startswith("foveal: exit"))
        assert ours or not done.returncode, done.stderr
        return ours, calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "bin").mkdir()
    for name, script in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return Job(tmp_path)


REQUEUED = ["requeue 77"]
NO_MODULE = "/usr/bin/python3: No module named foveal"


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [
        (1, NO_MODULE, NO_MODULE),
        (
            1,
            "Traceback (most recent call last):\nImportError: libcudart.so: cannot open shared object file\nmore",
            "ImportErr",
        ),
        (
            2,
            "slurmstepd-node2: error: execve(): /x/python: No such file or directory",
            "slurmstepd-node2: error: execve",
        ),
        (
            13,
            "slurmstepd: error: execve(): /x/python: Permission denied",
            "slurmstepd: error: execve(): /x/python: Perm",
        ),
        (255, "FATAL:   could not open image foveal.sif", "FATAL:   could not open image"),
        (137, "", "node2: task 1: Exited with exit code 137"),
    ],
)
def test_what_fails_before_an_attempt_is_tried_as_often_as_there_are_pauses(
    code: int, said: str, why: str, job: Job
) -> None:
    for _ in range(2):
        ours, calls = job.start(code, died("node2", code, said))
        assert (calls, f"foveal: exit code {code}, requeued; first to fail: node2: task 1" in ours) == (REQUEUED, True)
    ours, calls = job.start(code, died("node2", code, said))
    begin = f"foveal: exit code {code}, not requeued: 3 starts in a row failed before any attempt began, each first on node2: "
    assert ours.startswith(begin + why)
    assert calls == []
    assert list((job.folder / "runs").iterdir()) == [], "nothing is left behind"


def test_a_check_that_cannot_run_on_its_node_is_tried_again_and_named(job: Job) -> None:
    (job.folder / "bin/python.says").write_text("bash: line 1: python: command not found\n")
    assert [job.start(0, "")[1] for _ in range(2)] == [REQUEUED, REQUEUED]
    ours, calls = job.start(0, "")
    assert ours.endswith("each first on node1: bash: line 1: python: command not found")
    assert calls == []


def test_on_other_nodes_the_last_is_named(job: Job) -> None:
    for node in ("node2", "node1"):
        job.start(1, died(node, 1, NO_MODULE))
    assert "the last first on node2: " in job.start(1, died("node2", 1, NO_MODULE))[0]


def test_a_start_that_ended_otherwise_in_between_breaks_the_row(job: Job) -> None:
    """It was preempted, say, after a day of training: 200 of those may be followed by one failure each."""
    for _ in range(4):
        assert job.start(1, died("node2", 1, NO_MODULE))[1] == REQUEUED
        assert job.start(0, "attempt 3 begins at step 100: runs/x\n", "JobId=77 JobState=COMPLETING Reason=x")[1] == []
        assert list((job.folder / "runs").iterdir()) != []
    assert job.start(0, "")[1] == []
    assert list((job.folder / "runs").iterdir()) == [], "the run is finished"


def begun(step: int, run: str = "runs/x y") -> str:
    return died("node2", 1, f"attempt 3 begins at step {step}: {run}", "RuntimeError: out of memory")


def test_only_a_step_that_was_not_reached_before_is_progress(job: Job) -> None:
    limit = {"FOVEAL_MAX_RESTARTS": "3"}
    for step in (0, 100, 200, 200, 100):  # set back once
        assert job.start(1, begun(step), **limit)[1] == REQUEUED, step
    ours, calls = job.start(1, begun(200), **limit)
    assert "not requeued: 4 starts in a row got no further (max_restarts" in ours
    assert calls == []


def test_another_run_of_the_job_is_progress_too(job: Job) -> None:
    limit = {"FOVEAL_MAX_RESTARTS": "1"}
    for fold in range(4):
        assert job.start(1, begun(0, f"runs/fold{fold}"), **limit)[1] == REQUEUED
    assert job.start(1, begun(0, "runs/fold3"), **limit)[1] == []


def test_where_nothing_can_be_written_every_restart_counts(job: Job) -> None:
    (job.folder / "runs").write_text("")
    assert [job.start(1, begun(step), FOVEAL_MAX_RESTARTS="2")[1] for step in range(3)] == [REQUEUED, REQUEUED, []]


@pytest.mark.parametrize("script", ["pretrain_mae", "distill", "finetune"])
def test_ranks_fill_one_socket_after_the_other_as_gpus_are_numbered(script: str) -> None:
    options = parse_sbatch_options((ROOT / f"slurm/{script}.sh").read_text())
    assert options.values["distribution"] == "block:block", "Slurm's default deals ranks to sockets in turn"


@pytest.mark.parametrize("wish", ["", "ulimit -S -c 1000\n"])
def test_ranks_leave_no_core_dumps_unless_environment_sh_asks_for_them(wish: str, job: Job) -> None:
    """NCCL's time-out aborts every rank of a job at once."""
    (job.folder / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", job.folder / "slurm")
    with (job.folder / "slurm/environment.sh").open("a") as settings:
        settings.write(wish)
    (job.folder / "bin/srun").write_text(f'#!/bin/bash\nulimit -S -c > "{job.folder}/limit"\n')
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        job.start(0, "")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert (job.folder / "limit").read_text().strip() == ("1000" if wish else "0")


def test_storage_that_is_away_for_a_night_is_waited_for(job: Job) -> None:
    for _ in range(6):
        assert job.start(5, died("node1", 5, "foveal: s3://data does not answer"))[1] == REQUEUED


@pytest.mark.parametrize("code", [2, 3, 4, 6, 7])
def test_what_another_start_would_not_mend_ends_the_job(code: int, job: Job) -> None:
    ours, calls = job.start(0, died("node2", code, "foveal: it is so"))
    assert (ours, calls) == ("", []), "srun says it all went well"
    ours, calls = job.start(143, died("node2", code, "foveal: it is so"))
    assert ours.startswith(f"foveal: exit code {code}, not requeued: ")
    assert calls == []


def test_a_restart_that_another_rank_has_asked_for_is_called_off(job: Job) -> None:
    asked = "JobId=77 JobState=COMPLETING Reason=None Restarts=1 Command=x"
    assert job.start(143, died("node2", 2), job=asked)[1] == ["scancel 77"]


@pytest.mark.parametrize(
    ("code", "state"), [(4, "COMPLETING Reason=None Restarts=1"), (2, "RUNNING Reason=None Restarts=1"), (2, "COMPLETING Reason=x Restarts=0")]
)  # fmt: skip
def test_a_job_that_goes_on_elsewhere_is_let_alone(code: int, state: str, job: Job) -> None:
    assert job.start(143, died("node2", code), job=f"JobId=77 JobState={state} Command=x")[1] == []


def test_the_last_word_of_starts_without_progress_names_the_node(job: Job) -> None:
    for _ in range(2):
        job.start(1, begun(0))
    ours, _ = job.start(7, died("node1", 7, "foveal: each of the last 2 attempts ended without a checkpoint"))
    assert ours.endswith("several starts in a row got no further, each first on node2: RuntimeError: out of memory")


@pytest.mark.parametrize(("code", "calls"), [(0, REQUEUED), (2, [])])
def test_who_left_on_a_sigterm_goes_on_unless_a_rank_failed(code: int, calls: list[str], job: Job) -> None:
    left = (
        "foveal: saved and left on SIGTERM, which is left to the job script; it requeues the job unless a rank failed"
    )
    assert job.start(code, died("node2", code, left) if code else f"{left}\n")[1] == calls
