"""Whose a run directory is: real processes race for it, are killed, frozen and superseded."""

import json
import multiprocessing
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

from foveal.errors import CheckpointError, RestartLoopError
from foveal.training import lease as module
from foveal.training.lease import (
    Lease,
    LeaseHolder,
    acquire_lease,
    describe_this_process,
    list_attempts,
    read_start_steps,
)

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["foveal.training.lease"])
WAIT = 60  # seconds for a process to answer on a busy machine
BEAT, PATIENCE, ROUNDS = 0.05, 3.0, 20


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end


def taken(run: Path, job: dict[str, str] | None = None, host: str | None = None, restarts: int = 99) -> Lease:
    """An attempt of this process, or of one that says it is elsewhere."""
    who = describe_this_process(1, job or {})
    if host is not None:
        who = replace(who, host=host)
    return acquire_lease(
        run, who, max_attempts_without_progress=restarts, heartbeat_seconds=BEAT, timeout_seconds=PATIENCE
    )


def done(run: Path, why: str = "killed", code: int = 1, start: int | None = None, **more: Any) -> Lease:
    """An attempt that is over."""
    lease = taken(run, **more)
    if start is not None:
        lease.record_start(start)
    lease.record_end(why, code, start)
    lease.record_end("said too late", 0)  # as when a watchdog has spoken first
    return lease


# --- numbers and files ---


def test_attempts_are_numbered_and_tell_their_story(tmp_path: Path) -> None:
    first = taken(tmp_path, {"slurm_job_id": "17", "slurm_job_nodelist": "node[1-2]"})
    assert (first.number, first.start_steps, first.is_superseded) == (1, {}, False)
    first.record_start(0)
    first.record_end("asked to leave (SIGUSR1)", 0, 120)
    second = taken(tmp_path)
    assert (second.number, second.start_steps) == (2, {1: 0})
    second.record_start(120)
    told, running = list_attempts(tmp_path)
    assert told.holder is not None
    assert (told.number, told.holder.job, told.holder.nodes, told.holder.ranks) == (1, "17", "node[1-2]", 1)
    assert (told.start_step, told.end_step, told.exit_code, told.reason) == (0, 120, 0, "asked to leave (SIGUSR1)")
    assert told.duration_seconds is not None
    assert (running.number, running.start_step, running.end_step, running.reason) == (2, 120, None, None)
    second.record_end("finished", 0, 200)
    assert read_start_steps(tmp_path) == {1: 0, 2: 120}
    assert {each.name for each in (tmp_path / "attempts").iterdir()} == {
        f"{number}{part}.json" for number in ("0001", "0002") for part in ("", ".end", ".start")
    }


def test_starts_that_a_later_lower_one_makes_superfluous_are_dropped(tmp_path: Path) -> None:
    for step in (0, 100, 200, 50):
        done(tmp_path, start=step)
    done(tmp_path)  # never knew its step
    assert taken(tmp_path).start_steps == read_start_steps(tmp_path) == {1: 0, 4: 50}


def test_nothing_is_told_of_nothing(tmp_path: Path) -> None:
    assert list_attempts(tmp_path) == []
    assert read_start_steps(tmp_path) == {}


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
    lease = taken(tmp_path)
    lease.record_start(3000)
    assert (lease.number, lease.start_steps) == (3001, {3000: 3000})
    lease.record_end("finished", 0)
    assert len(calls) < 10


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"run/attempts cannot be written .*; set run.dir"):
        taken(tmp_path / "run")


def test_an_end_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lease = taken(tmp_path)
    (tmp_path / "attempts").rename(tmp_path / "elsewhere")
    lease.record_end("finished", 0)
    assert "the end of attempt 1 cannot be written down" in caplog.text


def test_a_lost_answer_of_nfs_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server made the name, its answer was lost, and the repeated request says that the name exists."""
    link = os.link

    def twice(here: Path, there: Path) -> None:
        link(here, there)
        link(here, there)

    monkeypatch.setattr(os, "link", twice)
    assert taken(tmp_path).number == 1


# --- real processes ---


def _hold(pipe: Connection, run: Path, job: dict[str, str], host: str | None, go: float = 0.0) -> None:
    """Take an attempt and keep it until told otherwise."""
    while time.time() < go:
        pass
    try:
        lease = taken(run, job, host)
        lease.record_start(0)
    except CheckpointError as error:
        pipe.send(str(error))
        return
    pipe.send(lease.number)
    while pipe.poll(WAIT) and (order := pipe.recv()) != "end":
        pipe.send(getattr(lease, order))
    lease.record_end("told to", 0, 0)
    pipe.send("ended")


class Other:
    """A process that holds, or tries to."""

    def __init__(self, run: Path, job: dict[str, str] | None = None, host: str | None = None, go: float = 0.0) -> None:
        self.pipe, there = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_hold, args=(there, run, job or {}, host, go))
        self.process.start()

    def says(self) -> Any:
        assert self.pipe.poll(WAIT), "no answer"
        return self.pipe.recv()

    def asked(self, what: str) -> Any:
        self.pipe.send(what)
        return self.says()

    def signalled(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join(WAIT)


@pytest.fixture
def others() -> Iterator[Callable[..., Other]]:
    """Starts processes, and ends them whatever happens."""
    started: list[Other] = []

    def start(*arguments: Any, **more: Any) -> Other:
        started.append(Other(*arguments, **more))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_of_two_that_race_exactly_one_wins(tmp_path: Path, others) -> None:
    for number in range(ROUNDS):
        run = tmp_path / str(number)
        go = time.time() + 0.3
        pair = [others(run, go=go), others(run, go=go)]
        answers = [each.says() for each in pair]
        assert 1 in answers, answers
        (refusal,) = [answer for answer in answers if answer != 1]
        assert f"{run} is being written by attempt 1 (on " in refusal
        for each in pair:
            each.close()


def test_a_live_holder_refuses_by_name(tmp_path: Path, others) -> None:
    other = others(tmp_path, {"slurm_job_id": "17"})
    assert other.says() == 1
    who = describe_this_process(1, {})
    with pytest.raises(CheckpointError) as caught:
        taken(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is being written by attempt 1 (job 17 on {who.host}, rank 0 pid {other.process.pid}); stop it first "
        f"or use another run.dir"
    )
    assert other.asked("lost") is False
    assert other.asked("end") == "ended"
    assert taken(tmp_path).number == 2


def test_a_killed_holder_on_this_host_is_followed_at_once(tmp_path: Path, others, monkeypatch) -> None:
    monkeypatch.setattr(module, "_wait_for_heartbeat", lambda *_: pytest.fail("its heartbeat was waited for"))
    other = others(tmp_path)
    assert other.says() == 1
    other.signalled(signal.SIGKILL)
    other.process.join(WAIT)
    lease = taken(tmp_path)
    assert (lease.number, lease.start_steps) == (2, {1: 0})


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    """Process numbers come round: this process lives, but it began at another time than the holder."""
    me = describe_this_process(1, {})
    before = replace(me, born=" ".join([*me.born.split()[:-1], "1"]))
    acquire_lease(tmp_path, before, max_attempts_without_progress=9, heartbeat_seconds=BEAT)
    assert taken(tmp_path).number == 2


def test_a_dead_process_that_its_parent_has_not_buried_is_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        until(lambda: module._process_identity(process.pid) is None)
        assert Path(f"/proc/{process.pid}").exists()
    assert module._process_identity(os.getpid()) == describe_this_process(1, {}).born


def test_a_frozen_holder_elsewhere_is_followed_when_it_gives_no_sign_of_life(tmp_path: Path, others) -> None:
    other = others(tmp_path, host="node2")
    assert other.says() == 1
    with pytest.raises(CheckpointError, match=r"attempt 1 \(on node2, rank 0 pid \d+\); stop it first"):
        taken(tmp_path)
    other.signalled(signal.SIGSTOP)  # it takes effect later, and a sign of life may be on its way
    until(lambda: Path(f"/proc/{other.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    lease = taken(tmp_path)
    assert lease.number == 2
    other.signalled(signal.SIGCONT)
    until(lambda: other.asked("lost"))
    assert not lease.check_superseded()


def test_a_requeued_job_follows_itself_and_the_old_one_learns_of_it(tmp_path: Path) -> None:
    """After a network cut the old ranks may still run when Slurm starts the job again."""
    old = taken(tmp_path, {"slurm_job_id": "17", "slurm_restart_count": "1"}, host="node1")
    for job in ({"slurm_job_id": "17", "slurm_restart_count": "1"}, {"slurm_job_id": "18"}):
        with pytest.raises(CheckpointError, match="attempt 1"):
            taken(tmp_path, job)
    new = taken(tmp_path, {"slurm_job_id": "17", "slurm_restart_count": "2"})
    assert new.number == 2
    assert old.check_superseded()
    assert old.is_superseded
    old.record_end("superseded", 4, 10)
    assert [told.exit_code for told in list_attempts(tmp_path)] == [4, None]


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
    """A job that is over is followed at once; else its heartbeat decides, and this one's heart beats."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_SCONTROL_TIMEOUT", 30.0 if answer != ANSWERS["hangs"][0] else 0.2)
    cluster = {"slurm_cluster_name": "one"}
    old = taken(tmp_path / "run", {"slurm_job_id": "17", **cluster}, host="node1")
    with pytest.raises(CheckpointError, match=r"job 17 on node1"):
        taken(tmp_path / "run", {"slurm_job_id": "18", "slurm_cluster_name": "two"})
    if over:
        assert taken(tmp_path / "run", {"slurm_job_id": "18", **cluster}).number == 2
    else:
        with pytest.raises(CheckpointError, match=r"job 17 on node1"):
            taken(tmp_path / "run", {"slurm_job_id": "18", **cluster})
    old.record_end("", 0)


# --- the loop limit ---


def test_attempts_without_progress_come_to_an_end(tmp_path: Path) -> None:
    done(tmp_path, start=0)
    for why in ("first", "second", "out of memory"):
        done(tmp_path, why, start=100)
    lease = taken(tmp_path, restarts=3)
    with pytest.raises(RestartLoopError) as caught:
        lease.record_start(100)
    assert str(caught.value) == (
        f"{tmp_path}: each of the last 3 attempts ended without a checkpoint newer than step 100, the last because: out of "
        f"memory; remove the cause and start again, which is counted anew"
    )
    told = list_attempts(tmp_path)[-1]
    assert (told.exit_code, told.reason) == (7, str(caught.value))
    done(tmp_path, start=100, restarts=3)  # somebody has looked at it: the count begins anew


def test_attempts_that_never_began_come_to_an_end_too(tmp_path: Path) -> None:
    gone = taken(tmp_path)
    gone._over.set()  # it vanishes,
    gone._thread.join()  # and a beat that it had begun is no sign of life
    (tmp_path / "attempts" / "0001.json").write_text(json.dumps({"host": "gone"}))
    done(tmp_path, "no such library", restarts=2)
    with pytest.raises(
        RestartLoopError, match="last 2 attempts ended before its first step, the last because: no such library"
    ):
        taken(tmp_path, restarts=2)


@pytest.mark.parametrize(("code", "start"), [(0, 100), (2, 100), (3, 100), (7, 100), (1, 50)])
def test_who_was_asked_to_leave_or_made_progress_does_not_count(code: int, start: int, tmp_path: Path) -> None:
    done(tmp_path, start=100)
    done(tmp_path, start=start, code=code)
    done(tmp_path, start=100)
    taken(tmp_path, restarts=2).record_start(100)


def test_what_ended_without_a_word_is_said_so(tmp_path: Path, others) -> None:
    other = others(tmp_path)
    assert other.says() == 1
    other.close()
    with pytest.raises(
        RestartLoopError, match="the last because: it ended without a word: killed, or its node was lost;"
    ):
        taken(tmp_path, restarts=1).record_start(0)


def test_who_is_described_in_words() -> None:
    who = LeaseHolder("node2", 123, "", 4, job="17")
    assert str(who) == "job 17 on node2, rank 0 pid 123"
    assert str(replace(who, job=None)) == "on node2, rank 0 pid 123"
