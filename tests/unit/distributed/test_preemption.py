"""Being asked to leave: a flag, an agreement, a checkpoint, and one requeue."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, stage_named

from foveal.distributed.preemption import (
    NOTICE_ENV_VAR,
    Preemption,
    ShutdownNotice,
    handle_stop_signals,
    read_seconds_left,
    read_shutdown_notice,
    requeue_slurm_job,
)
from foveal.distributed.world import World
from foveal.tracking.jsonl import read_metric_rows
from foveal.training.cli import load_config, run_stage
from foveal.training.plan import Plan
from foveal.training.run import Run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A folder with a stand-in that shows a running job and writes down what else it is asked, a line for each call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    lines = [
        "#!/bin/sh",
        'here=$(dirname "$0")',
        'case "$1 $2" in',
        '    "show job") cat "$here/state"; exit 0;;',
        '    "show partition") cat "$here/partition"; exit 0;;',
        '    "show config") cat "$here/config"; exit 0;;',
        '    "write batch_script") cat "$here/script"; exit 0;;',
        "esac",
        'echo "$@" >> "$here/calls"',
    ]
    script.write_text("\n".join(lines) + "\n")
    (folder / "state").write_text("JobId=77 JobName=pretrain JobState=RUNNING Reason=None\n")
    script.chmod(0o755)
    return folder


def calls(scontrol: Path) -> list[str]:
    file = scontrol / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_a_flag_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with handle_stop_signals(ALONE) as preemption:
        assert preemption.stop_reason is None
        os.kill(os.getpid(), number)
        assert preemption.stop_reason == number.name
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # Slurm repeats itself; that changes nothing
            assert (preemption.stop_reason, preemption.asked_again) == (number.name, False)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with pytest.raises(RuntimeError, match="a mistake"), handle_stop_signals(ALONE):
        raise RuntimeError("a mistake")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_interrupt_ends_the_process_where_it_stands() -> None:
    """A shell says 130 for it; no handler of Python's could run while a collective waits."""
    waiting = """
import os, signal, torch
from foveal.distributed.preemption import listening
from foveal.distributed.world import World
with listening(World(0, 1, 0, "none", torch.device("cpu"))) as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    print(preemption.heard, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", waiting], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGINT\n"), done.stderr


@pytest.mark.parametrize(("later", "hurried"), [(0.0, False), (5.0, True)])
def test_asked_again_is_in_a_hurry_and_an_echo_is_not(
    later: float, hurried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends TERM to the step and again to the job, within milliseconds."""
    preemption = Preemption(ALONE)
    preemption.handle_signal(signal.SIGUSR1, None)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + later)
    preemption.handle_signal(signal.SIGTERM, None)
    assert preemption.stop_reason == "SIGUSR1"
    assert preemption.is_urgent(0.0) is hurried


JOB = (
    "JobId=77 JobName=pretrain JobState={state} Reason={reason} RunTime=00:01:04 TimeLimit={limit} "
    "StartTime=2026-11-21T08:47:54 EndTime={end} Partition=low Command=/shared/train.sh JobState=MINE"
)
CONFIG = "KillWait                = 5 sec\nPreemptType             = preempt/{how}"
PARTITIONS = (
    "PartitionName=main GraceTime=0 PriorityTier=10 PreemptMode=REQUEUE State=UP\n"
    "PartitionName=low GraceTime={grace} PriorityTier={tier} PreemptMode={mode} State=UP"
)


def describe(
    scontrol: Path,
    *,
    state: str = "RUNNING",
    reason: str = "None",
    limit: str = "1-00:00:00",
    end: str = "2026-11-22T08:47:54",
    grace: int = 20,
    tier: int = 1,
    mode: str = "REQUEUE",
    how: str = "partition_prio",
    signals: str = "--signal=USR1@180 ",
) -> None:
    """What the stand-in says of the job, of its partition, of Slurm and of the batch script."""
    (scontrol / "state").write_text(JOB.format(state=state, reason=reason, limit=limit, end=end) + "\n")
    (scontrol / "partition").write_text(PARTITIONS.format(grace=grace, tier=tier, mode=mode) + "\n")
    (scontrol / "config").write_text(CONFIG.format(how=how) + "\n")
    (scontrol / "script").write_text(f"#!/bin/bash\n#SBATCH --time=24:00:00 {signals}--requeue\n")


@pytest.fixture
def in_step(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return scontrol


@pytest.mark.parametrize(
    ("said", "seconds", "source"),
    [
        ({}, 20, "GraceTime of partition low"),
        ({"grace": 600}, 180, "--signal in /shared/train.sh"),
        ({"grace": 0}, 5, "partition low has no GraceTime"),
        ({"tier": 10}, 180, "--signal in /shared/train.sh"),
        ({"mode": "OFF"}, 180, "--signal in /shared/train.sh"),
        ({"how": "none", "signals": "--signal=B:TERM "}, 60, "--signal in"),
        ({"how": "none", "signals": ""}, 5, "no --signal in the batch script"),
        ({"how": "none", "limit": "UNLIMITED"}, None, ""),
    ],
)
def test_the_notice_is_the_shortest_that_slurm_may_give(
    said: dict[str, Any], seconds: float | None, source: str, in_step: Path
) -> None:
    describe(in_step, **said)
    found = read_shutdown_notice()
    assert (found and found.seconds) == seconds
    assert found is None or source in found.source


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({}, 24 * 3600 - 64),
        ({"end": "2026-11-21T08:49:18"}, 20),  # preempted after 64 s, with 20 s of grace
        ({"end": "Unknown", "limit": "UNLIMITED"}, None),
        ({"state": "COMPLETING"}, 5),
    ],
)
def test_the_seconds_that_are_left_follow_the_end_that_slurm_plans(
    said: dict[str, Any], seconds: float | None, in_step: Path
) -> None:
    describe(in_step, **said)
    assert read_seconds_left() == seconds
    preemption = Preemption(ALONE)
    preemption.handle_signal(signal.SIGTERM, None)
    assert preemption.is_urgent(30.0) is (seconds is not None and seconds < 30)


def test_outside_slurm_nobody_knows_of_an_end(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    describe(scontrol)
    assert read_shutdown_notice() is None
    assert read_seconds_left() is None


def _hurry(world: World, told: Sequence[int]) -> bool:
    preemption = Preemption(world)
    if world.rank in told:
        preemption.asked_again = True
    return preemption.is_urgent(1.0)


@pytest.mark.parametrize(("told", "agreed"), [((), False), ((0,), True), ((1,), True), ((0, 1), True)])
def test_ranks_are_in_a_hurry_together(told: Sequence[int], agreed: bool, two_ranks: Ranks) -> None:
    assert two_ranks.call(_hurry, told) == [agreed, agreed]


def test_a_lead_that_slurm_keeps_to_itself_can_be_stated(in_step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(in_step, how="none")
    monkeypatch.setenv(NOTICE_ENV_VAR, "600")
    assert read_shutdown_notice() == ShutdownNotice(600.0, NOTICE_ENV_VAR)


def test_after_the_end_no_signal_is_heard() -> None:
    said = """
import os, signal
from foveal.distributed.preemption import deaf
deaf()
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
"""
    assert subprocess.run([sys.executable, "-c", said], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    "variables", [{}, {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"SLURM_STEP_ID": "0"}]
)
def test_outside_a_step_nobody_is_asked(
    variables: dict[str, str], scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requeue_slurm_job() is None
    assert calls(scontrol) == []


@pytest.mark.parametrize(
    ("does", "answer"),
    [
        ("exit 0", None),
        ("echo 'Access/permission denied' >&2; exit 1", "Access/permission denied"),
        ("exit 3", "scontrol ended with 3"),
        ("echo 'only a warning' >&2", None),
    ],
)
def test_slurm_is_asked_once_and_its_refusal_is_passed_on(
    does: str, answer: str | None, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (scontrol / "scontrol").open("a") as script:
        script.write(f"{does}\n")
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert requeue_slurm_job() == answer
    assert calls(scontrol) == ["requeue 77"]


@pytest.mark.parametrize(
    ("heard", "peers", "job", "asked", "left"),
    [
        ("SIGTERM", [0, 0], "RUNNING Reason=None PreemptTime=None", False, True),  # a peer failed, or scancel -s TERM
        ("SIGTERM", [0, 0], "RUNNING Reason=None", False, True),
        ("SIGTERM", [0, 0], "RUNNING Reason=None PreemptTime=2026-11-29T08:44:44", True, False),
        ("SIGTERM", [0, 0], "COMPLETING Reason=TimeLimit PreemptTime=None", True, False),
        ("SIGTERM", [0, 0], "COMPLETING Reason=None PreemptTime=None", False, False),
        ("SIGTERM", [0, 1], "RUNNING Reason=None PreemptTime=None", True, False),  # another rank heard SIGUSR1
        ("SIGUSR2", [0, 0], "RUNNING Reason=None PreemptTime=None", True, False),
        ("SIGUSR1", [0, 0], "COMPLETING Reason=None", False, False),
        ("SIGUSR1", [0, 0], "CANCELLED Reason=None", False, False),
        ("SIGTERM", [1, 0], "RUNNING Reason=None PreemptTime=None", False, False),  # another rank heard SIGINT
    ],
)
def test_slurm_is_asked_where_it_ends_the_job_and_a_sigterm_alone_is_left_to_the_job_script(
    heard: str, peers: list[int], job: str, asked: bool, left: bool, scontrol: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (scontrol / "state").write_text(f"JobId=77 JobName=pretrain JobState={job}\n")
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(World, "all_reduce_max", lambda _, mine: [max(pair) for pair in zip(mine, peers, strict=True)])
    monkeypatch.setattr(World, "on_rank0", lambda _, take: take())
    preemption = Preemption(ALONE)
    preemption.stop_reason = heard
    preemption.requeue_if_preempted()
    assert calls(scontrol) == (["requeue 77"] if asked else [])
    assert [each.startswith("foveal: saved and left on SIGTERM") for each in caplog.messages] == [True] * left


def test_a_container_without_scontrol_is_a_refusal_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert "scontrol" in (requeue_slurm_job() or "")


def _told_while_training(world: World, config: Path, run: Path, scontrol: Path, told: int) -> bool:
    """Fine-tune inside a step of Slurm; rank ``told`` hears SIGUSR1 before its first step. Whether the run left."""
    stage = stage_named("finetune")
    left: list[bool] = []

    def train(plan: Plan, opened: Run) -> None:
        if world.rank == told:
            os.kill(os.getpid(), signal.SIGUSR1)
        stage.train(plan, opened)
        left.append(opened.is_preempted)

    before = dict(os.environ)
    os.environ |= STEP | {"PATH": f"{scontrol}{os.pathsep}{os.environ['PATH']}"}
    try:
        cfg = load_config(stage.config_class, "finetune", str(config), [f"run.dir={run}", "tracking.uri=null"])
        run_stage(dataclasses.replace(stage, train=train), cfg, world)
    finally:
        os.environ.clear()
        os.environ |= before
    return left[0]


def test_ranks_leave_together_saved_and_requeued_once(
    configs: dict[str, Path], two_ranks: Ranks, scontrol: Path, tmp_path: Path
) -> None:
    """Only rank 1 hears of it. The job that is started again goes on behind the checkpoint, to the end."""
    run = tmp_path / "run"
    assert two_ranks.call(_told_while_training, configs["finetune"], run, scontrol, 1) == [True, True]
    assert calls(scontrol) == ["requeue 77"]
    saved = max(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*"))
    assert not (run / "finished.json").exists()
    assert [row["step"] for row in read_metric_rows(run / "metrics.jsonl")] == list(range(1, saved + 1))
    assert two_ranks.call(_told_while_training, configs["finetune"], run, scontrol, -1) == [False, False]
    assert calls(scontrol) == ["requeue 77"]
    assert (run / "finished.json").exists()
    steps = [row["step"] for row in read_metric_rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > saved
