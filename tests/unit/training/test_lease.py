"""The lease on a run directory: real processes race for it and are killed, stopped and superseded."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from forked import CONTEXT, stop

from foveal import slurm
from foveal.errors import CheckpointError, RestartLoopError
from foveal.slurm import SlurmJob
from foveal.training import lease as module
from foveal.training import lease_holder
from foveal.training.lease import Lease, acquire_lease, list_attempts, read_relevant_start_steps
from foveal.training.lease_holder import LeaseHolder, current_holder

WAIT = 60  # seconds until a process answers on a busy machine
BEAT, PATIENCE, ROUNDS = 0.05, 3.0, 20


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline


def acquire(run: Path, job: SlurmJob | None = None, host: str | None = None, restarts: int = 99) -> Lease:
    """Acquire the lease for this process, or for a process that claims to run on ``host``."""
    holder = current_holder(1, job)
    if host is not None:
        holder = replace(holder, host=host)
    return acquire_lease(
        run,
        holder,
        max_attempts_without_progress=restarts,
        heartbeat_interval_seconds=BEAT,
        heartbeat_timeout_seconds=PATIENCE,
    )


def run_attempt(run: Path, reason: str = "killed", code: int = 1, start: int | None = None, **options: Any) -> Lease:
    """Acquire the lease and end the attempt."""
    lease = acquire(run, **options)
    if start is not None:
        lease.record_start(start)
    lease.record_end_and_release(reason, code, start)
    lease.record_end_and_release("too late", 0)  # has no effect, as after a watchdog recorded the end
    return lease


# --- numbers and files ---


def test_attempts_are_numbered_and_tell_their_story(tmp_path: Path) -> None:
    first = acquire(tmp_path, SlurmJob("17", node_list="node[1-2]"))
    assert (first.number, first.start_steps_by_attempt, first.is_superseded) == (1, {}, False)
    first.record_start(0)
    first.record_end_and_release("asked to leave (SIGUSR1)", 0, 120)
    second = acquire(tmp_path)
    assert (second.number, second.start_steps_by_attempt) == (2, {1: 0})
    second.record_start(120)
    ended, running = list_attempts(tmp_path)
    assert ended.holder is not None
    assert (ended.number, ended.holder.job, ended.holder.nodes, ended.holder.ranks) == (1, "17", "node[1-2]", 1)
    assert (ended.start_step, ended.end_step, ended.exit_code, ended.reason) == (0, 120, 0, "asked to leave (SIGUSR1)")
    assert ended.duration_seconds is not None
    assert (running.number, running.start_step, running.end_step, running.reason) == (2, 120, None, None)
    second.record_end_and_release("finished", 0, 200)
    assert read_relevant_start_steps(tmp_path) == {1: 0, 2: 120}
    assert {file.name for file in (tmp_path / "attempts").iterdir()} == {
        f"{number}{part}.json" for number in ("0001", "0002") for part in ("", ".end", ".start")
    }


def test_starts_that_a_later_lower_one_makes_superfluous_are_dropped(tmp_path: Path) -> None:
    for step in (0, 100, 200, 50):
        run_attempt(tmp_path, start=step)
    run_attempt(tmp_path)  # without a start step
    assert acquire(tmp_path).start_steps_by_attempt == read_relevant_start_steps(tmp_path) == {1: 0, 4: 50}


def test_nothing_is_told_of_nothing(tmp_path: Path) -> None:
    assert list_attempts(tmp_path) == []
    assert read_relevant_start_steps(tmp_path) == {}


def test_thousands_of_attempts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    for number in range(1, 3001):
        for part, content in (
            ("", {}),
            (".start", {"step": number, "starts": {number: number}}),
            (".end", {"code": 0}),
        ):
            (folder / f"{number:04d}{part}.json").write_text(json.dumps(content))
    read, calls = module._read_bytes_or_empty, []
    monkeypatch.setattr(module, "_read_bytes_or_empty", lambda file: (calls.append(file), read(file))[1])
    lease = acquire(tmp_path)
    lease.record_start(3000)
    assert (lease.number, lease.start_steps_by_attempt) == (3001, {3000: 3000})
    lease.record_end_and_release("finished", 0)
    assert len(calls) < 10


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"run/attempts cannot be written .*; set run.dir"):
        acquire(tmp_path / "run")


def test_an_end_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lease = acquire(tmp_path)
    (tmp_path / "attempts").rename(tmp_path / "elsewhere")
    lease.record_end_and_release("finished", 0)
    assert "the end of attempt 1 cannot be written down" in caplog.text


def test_a_lost_answer_of_nfs_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server created the name but its reply was lost, and the repeated request reports that the name exists."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert acquire(tmp_path).number == 1


# --- real processes ---


def _hold(pipe: Connection, run: Path, job: SlurmJob | None, host: str | None, start_time: float = 0.0) -> None:
    """Acquire the lease and hold it until the message "end"; any other message names an attribute to send."""
    while time.time() < start_time:
        pass
    try:
        lease = acquire(run, job, host)
        lease.record_start(0)
    except CheckpointError as error:
        pipe.send(str(error))
        return
    pipe.send(lease.number)
    while pipe.poll(WAIT) and (name := pipe.recv()) != "end":
        pipe.send(getattr(lease, name))
    lease.record_end_and_release("requested", 0, 0)
    pipe.send("ended")


class HolderProcess:
    """A process that acquires the lease and holds it."""

    def __init__(
        self, run: Path, job: SlurmJob | None = None, host: str | None = None, start_time: float = 0.0
    ) -> None:
        self.pipe, child_pipe = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_hold, args=(child_pipe, run, job, host, start_time))
        self.process.start()

    def receive(self) -> Any:
        assert self.pipe.poll(WAIT), "no answer"
        return self.pipe.recv()

    def request(self, message: str) -> Any:
        self.pipe.send(message)
        return self.receive()

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join(WAIT)


@pytest.fixture
def start_holder() -> Iterator[Callable[..., HolderProcess]]:
    """Start holder processes and kill them after the test."""
    started: list[HolderProcess] = []

    def start(*arguments: Any, **options: Any) -> HolderProcess:
        started.append(HolderProcess(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_of_two_that_race_exactly_one_wins(tmp_path: Path, start_holder) -> None:
    for number in range(ROUNDS):
        run = tmp_path / str(number)
        start_time = time.time() + 0.3
        pair = [start_holder(run, start_time=start_time) for _ in range(2)]
        answers = [process.receive() for process in pair]
        assert 1 in answers, answers
        (refusal,) = [answer for answer in answers if answer != 1]
        assert f"{run} is being written by attempt 1 (on " in refusal
        for process in pair:
            process.close()


def test_a_live_holder_refuses_by_name(tmp_path: Path, start_holder) -> None:
    holder = start_holder(tmp_path, SlurmJob("17"))
    assert holder.receive() == 1
    this_process = current_holder(1)
    with pytest.raises(CheckpointError) as caught:
        acquire(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is being written by attempt 1 (job 17 on {this_process.host}, rank 0 pid {holder.process.pid}); "
        f"stop it first or use another run.dir"
    )
    assert holder.request("is_superseded") is False
    assert holder.request("end") == "ended"
    assert acquire(tmp_path).number == 2


def test_a_killed_holder_on_this_host_is_followed_at_once(tmp_path: Path, start_holder, monkeypatch) -> None:
    monkeypatch.setattr(module, "_wait_for_heartbeat", lambda *_: pytest.fail("its heartbeat was waited for"))
    holder = start_holder(tmp_path)
    assert holder.receive() == 1
    holder.send_signal(signal.SIGKILL)
    holder.process.join(WAIT)
    lease = acquire(tmp_path)
    assert (lease.number, lease.start_steps_by_attempt) == (2, {1: 0})


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    """Pids are reused: a process with the holder's pid is alive, but it started at another time."""
    current = current_holder(1)
    previous = replace(current, born=" ".join([*current.born.split()[:-1], "1"]))
    acquire_lease(tmp_path, previous, max_attempts_without_progress=9, heartbeat_interval_seconds=BEAT)
    assert acquire(tmp_path).number == 2


def test_a_dead_process_that_its_parent_has_not_buried_is_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: lease_holder._process_identity(process.pid) is None)
        assert Path(f"/proc/{process.pid}").exists()
    assert lease_holder._process_identity(os.getpid()) == current_holder(1).born


def test_a_frozen_holder_elsewhere_is_followed_when_it_gives_no_sign_of_life(tmp_path: Path, start_holder) -> None:
    holder = start_holder(tmp_path, host="node2")
    assert holder.receive() == 1
    with pytest.raises(CheckpointError, match=r"attempt 1 \(on node2, rank 0 pid \d+\); stop it first"):
        acquire(tmp_path)
    stop(holder.process.pid)
    lease = acquire(tmp_path)
    assert lease.number == 2
    holder.send_signal(signal.SIGCONT)
    wait_until(lambda: holder.request("is_superseded"))
    assert not lease.poll_superseded()


def test_a_requeued_job_follows_itself_and_the_old_one_learns_of_it(tmp_path: Path) -> None:
    """After a network cut, the old ranks may still run when Slurm requeues the job."""
    old = acquire(tmp_path, SlurmJob("17", 1), host="node1")
    for job in (SlurmJob("17", 1), SlurmJob("18")):
        with pytest.raises(CheckpointError, match="attempt 1"):
            acquire(tmp_path, job)
    new = acquire(tmp_path, SlurmJob("17", 2))
    assert new.number == 2
    assert old.poll_superseded()
    assert old.is_superseded
    old.record_end_and_release("superseded", 4, 10)
    assert [record.exit_code for record in list_attempts(tmp_path)] == [4, None]


ANSWERS = {
    "over": ("echo JobId=17 JobState=NODE_FAIL Reason=x", True),
    "running": ("echo JobId=17 JobState=RUNNING Reason=x", False),
    "closing": ("echo JobId=17 JobState=COMPLETING Reason=x", False),
    "forgotten": ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
    "no answer": ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", False),
    "hangs": ("exec sleep 60", False),
}


@pytest.mark.parametrize(("answer", "over"), ANSWERS.values(), ids=ANSWERS.keys())
def test_slurm_is_asked_about_another_job(
    answer: str, over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ended job is superseded at once; for any other job the heartbeat decides, and here it is alive."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_SCONTROL_TIMEOUT_SECONDS", 30.0 if answer != ANSWERS["hangs"][0] else 0.2)
    old = acquire(tmp_path / "run", SlurmJob("17", cluster="one"), host="node1")
    with pytest.raises(CheckpointError, match=r"job 17 on node1"):
        acquire(tmp_path / "run", SlurmJob("18", cluster="two"))
    if over:
        assert acquire(tmp_path / "run", SlurmJob("18", cluster="one")).number == 2
    else:
        with pytest.raises(CheckpointError, match=r"job 17 on node1"):
            acquire(tmp_path / "run", SlurmJob("18", cluster="one"))
    old.record_end_and_release("", 0)


# --- the loop limit ---


def test_attempts_without_progress_come_to_an_end(tmp_path: Path) -> None:
    run_attempt(tmp_path, start=0)
    for reason in ("first", "second", "out of memory"):
        run_attempt(tmp_path, reason, start=100)
    lease = acquire(tmp_path, restarts=3)
    with pytest.raises(RestartLoopError) as caught:
        lease.record_start(100)
    assert str(caught.value) == (
        f"{tmp_path}: each of the last 3 attempts ended without a checkpoint newer than step 100, the last because: "
        f"out of memory; remove the cause and start again, which is counted anew"
    )
    record = list_attempts(tmp_path)[-1]
    assert (record.exit_code, record.reason) == (7, str(caught.value))
    run_attempt(tmp_path, start=100, restarts=3)  # a restart by hand resets the count


def test_attempts_that_never_began_come_to_an_end_too(tmp_path: Path) -> None:
    vanished = acquire(tmp_path)
    vanished._ended.set()  # without recording the end
    vanished._thread.join()  # a heartbeat in flight would count as a sign of life
    (tmp_path / "attempts" / "0001.json").write_text(json.dumps({"host": "gone"}))
    run_attempt(tmp_path, "no such library", restarts=2)
    with pytest.raises(
        RestartLoopError, match="last 2 attempts ended before its first step, the last because: no such library"
    ):
        acquire(tmp_path, restarts=2)


@pytest.mark.parametrize(("code", "start"), [(0, 100), (2, 100), (3, 100), (7, 100), (1, 50)])
def test_who_was_asked_to_leave_or_made_progress_does_not_count(code: int, start: int, tmp_path: Path) -> None:
    run_attempt(tmp_path, start=100)
    run_attempt(tmp_path, start=start, code=code)
    run_attempt(tmp_path, start=100)
    acquire(tmp_path, restarts=2).record_start(100)


def test_what_ended_without_a_word_is_said_so(tmp_path: Path, start_holder) -> None:
    holder = start_holder(tmp_path)
    assert holder.receive() == 1
    holder.close()
    with pytest.raises(
        RestartLoopError, match="the last because: it ended without a word: killed, or its node was lost;"
    ):
        acquire(tmp_path, restarts=1).record_start(0)


def test_who_is_described_in_words() -> None:
    holder = LeaseHolder("node2", 123, "", 4, job="17")
    assert str(holder) == "job 17 on node2, rank 0 pid 123"
    assert str(replace(holder, job=None)) == "on node2, rank 0 pid 123"
