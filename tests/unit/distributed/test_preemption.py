"""Preemption: a flag, an agreement of the ranks, a checkpoint, and one requeue."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clock import Clock
from ranks import Ranks, stage_named

from foveal.distributed import preemption as preemption_module
from foveal.distributed.preemption import (
    NOTICE_ENV_VAR,
    Preemption,
    ShutdownNotice,
    handle_stop_signals,
    read_shutdown_notice,
    read_slurm_seconds_left,
    requeue_slurm_job_if_due,
)
from foveal.distributed.world import World
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.plan import Plan
from foveal.training.run import Run

SINGLE = World(0, 1, 0, "none", torch.device("cpu"))
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.fixture(autouse=True)
def no_slurm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A folder with a fake scontrol that shows a running job and writes each other call as a line into ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    lines = [
        "#!/bin/sh",
        'folder=$(dirname "$0")',
        'case "$1 $2" in',
        '    "show job") cat "$folder/state"; exit 0;;',
        '    "show partition") cat "$folder/partition"; exit 0;;',
        '    "show config") cat "$folder/config"; exit 0;;',
        '    "write batch_script") cat "$folder/script"; exit 0;;',
        "esac",
        'echo "$@" >> "$folder/calls"',
    ]
    script.write_text("\n".join(lines) + "\n")
    (folder / "state").write_text("JobId=77 JobName=pretrain JobState=RUNNING Reason=None\n")
    script.chmod(0o755)
    return folder


def calls(scontrol: Path) -> list[str]:
    file = scontrol / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_a_flag_and_the_handlers_are_put_back(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption_module, "_REPEAT_WINDOW_SECONDS", 60.0)  # for a busy machine
    before = [signal.getsignal(number) for number in SIGNALS]
    with handle_stop_signals(SINGLE) as preemption:
        assert preemption.stop_reason is None
        os.kill(os.getpid(), number)
        assert preemption.stop_reason == number.name
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # a repeat by Slurm changes nothing
            assert (preemption.stop_reason, preemption.requested_again) == (number.name, False)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(RuntimeError, match="a mistake"), handle_stop_signals(SINGLE):
        raise RuntimeError("a mistake")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_interrupt_ends_the_process_where_it_stands() -> None:
    """A shell shows exit code 130. A Python handler could not run while a collective waits."""
    script = """
import os, signal, torch
from foveal.distributed.preemption import handle_stop_signals
from foveal.distributed.world import World
with handle_stop_signals(World(0, 1, 0, "none", torch.device("cpu"))) as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    print(preemption.stop_reason, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still running", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr[:15]) == (-signal.SIGINT, "SIGINT\n", "foveal: Ctrl-C:")


@pytest.mark.parametrize(("delay", "urgent"), [(0.5, False), (5.0, True)])
def test_a_second_request_is_urgent_and_an_echo_is_not(
    delay: float, urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends TERM to the step and again to the job, within milliseconds."""
    clock, preemption = Clock(), Preemption(SINGLE)
    monkeypatch.setattr(preemption_module, "time", SimpleNamespace(monotonic=clock))
    preemption.handle_signal(signal.SIGUSR1, None)
    clock.pass_(delay)
    preemption.handle_signal(signal.SIGTERM, None)
    assert preemption.stop_reason == "SIGUSR1"
    assert preemption.any_rank_urgent(0.0) is urgent


JOB = (
    "JobId=77 JobName=pretrain JobState={state} Reason={reason} RunTime=00:01:04 TimeLimit={limit} "
    "StartTime=2026-11-21T08:47:54 EndTime={end} Partition=low Command=/shared/train.sh JobState=MINE"
)
CONFIG = "KillWait                = 5 sec\nPreemptType             = preempt/{preempt_type}"
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
    preempt_type: str = "partition_prio",
    signals: str = "--signal=USR1@180 ",
) -> None:
    """Set the fake scontrol's answers about the job, its partition, Slurm's config and the batch script."""
    (scontrol / "state").write_text(JOB.format(state=state, reason=reason, limit=limit, end=end) + "\n")
    (scontrol / "partition").write_text(PARTITIONS.format(grace=grace, tier=tier, mode=mode) + "\n")
    (scontrol / "config").write_text(CONFIG.format(preempt_type=preempt_type) + "\n")
    (scontrol / "script").write_text(f"#!/bin/bash\n#SBATCH --time=24:00:00 {signals}--requeue\n")


@pytest.fixture
def in_step(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return scontrol


@pytest.mark.parametrize(
    ("answers", "seconds", "source"),
    [
        ({}, 20, "GraceTime of partition low"),
        ({"grace": 600}, 180, "--signal in /shared/train.sh"),
        ({"grace": 0}, 5, "partition low has no GraceTime"),
        ({"tier": 10}, 180, "--signal in /shared/train.sh"),
        ({"mode": "OFF"}, 180, "--signal in /shared/train.sh"),
        ({"preempt_type": "none", "signals": "--signal=B:TERM "}, 60, "--signal in"),
        ({"preempt_type": "none", "signals": ""}, 5, "no --signal in the batch script"),
        ({"preempt_type": "none", "limit": "UNLIMITED"}, None, ""),
    ],
)
def test_the_notice_is_the_shortest_that_slurm_may_give(
    answers: dict[str, Any], seconds: float | None, source: str, in_step: Path
) -> None:
    describe(in_step, **answers)
    notice = read_shutdown_notice()
    assert (notice and notice.seconds) == seconds
    assert notice is None or source in notice.source


@pytest.mark.parametrize(
    ("answers", "seconds"),
    [
        ({}, 24 * 3600 - 64),
        ({"end": "2026-11-21T08:49:18"}, 20),  # preempted after 64 s, with 20 s of grace
        ({"end": "Unknown", "limit": "UNLIMITED"}, None),
        ({"state": "COMPLETING"}, 5),
    ],
)
def test_the_seconds_that_are_left_follow_the_end_that_slurm_plans(
    answers: dict[str, Any], seconds: float | None, in_step: Path
) -> None:
    describe(in_step, **answers)
    assert read_slurm_seconds_left() == seconds
    preemption = Preemption(SINGLE)
    preemption.handle_signal(signal.SIGTERM, None)
    assert preemption.any_rank_urgent(30.0) is (seconds is not None and seconds < 30)


def test_outside_slurm_no_end_is_known(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    describe(scontrol)
    assert read_shutdown_notice() is None
    assert read_slurm_seconds_left() is None


def _is_urgent(world: World, asked_ranks: Sequence[int]) -> bool:
    preemption = Preemption(world)
    if world.rank in asked_ranks:
        preemption.requested_again = True
    return preemption.any_rank_urgent(1.0)


@pytest.mark.parametrize(("asked_ranks", "urgent"), [((), False), ((0,), True), ((1,), True), ((0, 1), True)])
def test_ranks_agree_on_urgency(asked_ranks: Sequence[int], urgent: bool, two_ranks: Ranks) -> None:
    assert two_ranks.call(_is_urgent, asked_ranks) == [urgent, urgent]


def test_a_lead_that_slurm_keeps_to_itself_can_be_stated(in_step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(in_step, preempt_type="none")
    monkeypatch.setenv(NOTICE_ENV_VAR, "600")
    assert read_shutdown_notice() == ShutdownNotice(600.0, NOTICE_ENV_VAR)


def test_after_the_end_signals_are_ignored() -> None:
    script = """
import os, signal
from foveal.distributed.preemption import ignore_stop_signals
ignore_stop_signals()
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=240, check=False).returncode == 0


@pytest.mark.parametrize(
    "variables", [{}, {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"SLURM_STEP_ID": "0"}]
)
def test_outside_a_step_slurm_is_not_asked(
    variables: dict[str, str], scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requeue_slurm_job_if_due() is None
    assert calls(scontrol) == []


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("exit 0", None),
        ("echo 'Access/permission denied' >&2; exit 1", "Access/permission denied"),
        ("exit 3", "scontrol ended with 3"),
        ("echo 'only a warning' >&2", None),
    ],
)
def test_slurm_is_asked_once_and_its_refusal_is_passed_on(command: str, answer: str | None, in_step: Path) -> None:
    with (in_step / "scontrol").open("a") as script:
        script.write(f"{command}\n")
    assert requeue_slurm_job_if_due() == answer
    assert calls(in_step) == ["requeue 77"]


@pytest.mark.parametrize(
    ("stop_reason", "peers", "job", "requeued", "left_to_script"),
    [
        ("SIGTERM", [0, 0], "RUNNING Reason=None PreemptTime=None", False, True),  # a peer failed, or scancel -s TERM
        ("SIGTERM", [0, 0], "RUNNING Reason=None", False, True),
        ("SIGTERM", [0, 0], "RUNNING Reason=None PreemptTime=2026-11-29T08:44:44", True, False),
        ("SIGTERM", [0, 0], "COMPLETING Reason=TimeLimit PreemptTime=None", True, False),
        ("SIGTERM", [0, 0], "COMPLETING Reason=None PreemptTime=None", False, False),
        ("SIGTERM", [0, 1], "RUNNING Reason=None PreemptTime=None", True, False),  # another rank got SIGUSR1
        ("SIGUSR2", [0, 0], "RUNNING Reason=None PreemptTime=None", True, False),
        ("SIGUSR1", [0, 0], "COMPLETING Reason=None", False, False),
        ("SIGUSR1", [0, 0], "CANCELLED Reason=None", False, False),
        ("SIGTERM", [1, 0], "RUNNING Reason=None PreemptTime=None", False, False),  # another rank got SIGINT
    ],
)
def test_slurm_is_asked_where_it_ends_the_job_and_a_sigterm_alone_is_left_to_the_job_script(
    stop_reason: str, peers: list[int], job: str, requeued: bool, left_to_script: bool, scontrol: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (scontrol / "state").write_text(f"JobId=77 JobName=pretrain JobState={job}\n")
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        World, "all_reduce_max", lambda _, flags: [max(pair) for pair in zip(flags, peers, strict=True)]
    )
    monkeypatch.setattr(World, "on_rank0", lambda _, function: function())
    preemption = Preemption(SINGLE)
    preemption.stop_reason = stop_reason
    preemption.requeue_unless_stopped_manually()
    assert calls(scontrol) == (["requeue 77"] if requeued else [])
    messages = [message.startswith("foveal: saved and left on SIGTERM") for message in caplog.messages]
    assert messages == [True] * left_to_script


def test_a_container_without_scontrol_is_a_refusal_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert "scontrol" in (requeue_slurm_job_if_due() or "")


def _signalled_while_training(world: World, config: Path, run: Path, scontrol: Path, signalled_rank: int) -> bool:
    """Fine-tune inside a Slurm step; ``signalled_rank`` gets SIGUSR1 before its first step. Return whether it left."""
    stage = stage_named("finetune")
    preempted: list[bool] = []

    def train(plan: Plan, opened: Run) -> None:
        if world.rank == signalled_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        stage.functions.train(plan, opened)
        preempted.append(opened.is_preempted)

    before = dict(os.environ)
    os.environ |= STEP | {"PATH": f"{scontrol}{os.pathsep}{os.environ['PATH']}"}
    try:
        cfg = load_config(stage.config_class, "finetune", str(config), [f"run.dir={run}", "tracking.uri=null"])
        functions = dataclasses.replace(stage.functions, train=train)
        run_stage(dataclasses.replace(stage, import_functions=lambda: functions), cfg, world)
    finally:
        os.environ.clear()
        os.environ |= before
    return preempted[0]


def test_ranks_leave_together_saved_and_requeued_once(
    configs: dict[str, Path], two_ranks: Ranks, scontrol: Path, tmp_path: Path
) -> None:
    """Only rank 1 gets the signal. The requeued job continues from the checkpoint to the end."""
    run = tmp_path / "run"
    assert two_ranks.call(_signalled_while_training, configs["finetune"], run, scontrol, 1) == [True, True]
    assert calls(scontrol) == ["requeue 77"]
    saved = max(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*"))
    assert not (run / "finished.json").exists()
    assert [row["step"] for row in read_rows_without_time(run / "metrics.jsonl")] == list(range(1, saved + 1))
    assert two_ranks.call(_signalled_while_training, configs["finetune"], run, scontrol, -1) == [False, False]
    assert calls(scontrol) == ["requeue 77"]
    assert (run / "finished.json").exists()
    steps = [row["step"] for row in read_rows_without_time(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > saved
