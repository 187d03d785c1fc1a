"""The state of a run: what its records say, what this host sees, what Slurm says, and how old the heartbeat is."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from run_directories import begin_attempt, change_holder, end_attempt, leave_without_word, make_run

from foveal.runs.record import read_run
from foveal.runs.run_state import find_state
from foveal.slurm import SlurmJobStatus

JOB = SlurmJobStatus("7", "RUNNING", "", "main", "", False, 100.0, 40.0, None, "node1")


def state_of(run: Path, job: SlurmJobStatus | None = None, later: float = 0.0) -> tuple[str, str]:
    report = find_state(read_run(run), job, time.time() + later)
    return report.state, report.evidence


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (0, "saved-and-left"),
        (1, "failed"),
        (2, "failed"),
        (3, "diverged"),
        (4, "superseded"),
        (5, "failed"),
        (7, "failed"),
    ],
)
def test_an_end_is_its_exit_code_whatever_the_tags_say(tmp_path: Path, code: int, state: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "tags.json").write_text('{"state": "running"}')  # of an attempt before, or one that hung
    end_attempt(run, "why", code)
    assert state_of(run) == (state, "why")
    assert state_of(run, replace(JOB, state="PENDING", reason="Priority")) == ("waiting", "why")


def test_a_requeued_job_that_runs_again_is_waited_for_until_its_attempt_begins(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    end_attempt(run, "preempted", 0)
    assert state_of(run, JOB)[0] == "saved-and-left"
    assert state_of(run, replace(JOB, state="CONFIGURING", restart_count=1)) == ("waiting", "preempted")
    assert state_of(run, replace(JOB, state="CANCELLED", restart_count=1))[0] == "saved-and-left"


def test_finished_and_not_begun(tmp_path: Path) -> None:
    assert state_of(make_run(tmp_path / "new")) == ("unknown", "no attempt has begun")
    assert state_of(make_run(tmp_path / "old", finished={"loss": 1.0}))[0] == "finished"


def test_a_process_of_this_host_is_looked_at(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease = begin_attempt(run)
    assert state_of(run) == ("running", "")
    born = read_run(run).attempts[0].holder
    assert born is not None
    change_holder(run, 1, born=f"{born.born.rpartition(' ')[0]} 1")
    assert state_of(run)[0] == "killed"
    assert state_of(run, replace(JOB, state="PENDING"))[0] == "waiting"
    lease.record_end_and_release("", 0)


def test_on_another_host_the_heartbeat_tells(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    leave_without_word(run)
    assert state_of(run) == ("running", "")
    assert state_of(run, later=-3600.0)[0] == "running"  # a clock that is behind
    assert state_of(run, later=61.0)[0] == "unknown"
    assert "elsewhere" in state_of(run, later=61.0)[1]


def test_slurm_knows_more_than_a_silent_heartbeat(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    leave_without_word(run, job="7", beat_age=3600.0)
    assert state_of(run, JOB)[0] == "unknown"  # the job lives, its heartbeat does not
    assert state_of(run, replace(JOB, state="TIMEOUT")) == ("killed", "its job 7 is TIMEOUT")
    assert state_of(run, replace(JOB, state="PENDING")) == ("waiting", "Slurm starts job 7 again")
    assert state_of(run, replace(JOB, restart_count=1))[0] == "waiting"
    assert state_of(run)[0] == "unknown"


def test_a_damaged_record_is_unknown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    leave_without_word(run)
    (run / "attempts" / "0001.json").write_text('{"host"')
    assert state_of(run) == ("unknown", "the record of its process is damaged")
