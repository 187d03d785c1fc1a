"""Being asked to leave: a flag, an agreement, a checkpoint, and one requeue."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import Ranks, stage_named

from foveal.distributed.preemption import Preemption, listening, requeue
from foveal.distributed.world import World
from foveal.door import enter, load
from foveal.runtime import Run
from foveal.stage import Plan
from foveal.tracking.jsonl import read_rows

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
        'if [ "$1" = show ]; then cat "$here/state"; exit 0; fi',
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
    with listening(ALONE) as preemption:
        assert not preemption.agreed()
        os.kill(os.getpid(), number)
        assert preemption.heard == number.name
        assert preemption.agreed()
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # Slurm repeats itself; that changes nothing
            assert preemption.agreed()
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with pytest.raises(RuntimeError, match="a mistake"), listening(ALONE):
        raise RuntimeError("a mistake")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_interrupt_means_now() -> None:
    with listening(ALONE) as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.heard == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def _agree(world: World, told: Sequence[int]) -> bool:
    preemption = Preemption(world)
    if world.rank in told:
        preemption.note(signal.SIGUSR1, None)
    return preemption.agreed()


@pytest.mark.parametrize(("told", "agreed"), [((), False), ((0,), True), ((1,), True), ((0, 1), True)])
def test_ranks_agree(told: Sequence[int], agreed: bool, two_ranks: Ranks) -> None:
    assert two_ranks.call(_agree, told) == [agreed, agreed]


@pytest.mark.parametrize(
    "variables", [{}, {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"SLURM_STEP_ID": "0"}]
)
def test_outside_a_step_nobody_is_asked(
    variables: dict[str, str], scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requeue() is None
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
    assert requeue() == answer
    assert calls(scontrol) == ["requeue 77"]


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_a_job_that_somebody_cancels_is_left_to_end(
    state: str, asked: bool, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scontrol / "state").write_text(f"JobId=77 JobName=pretrain JobState={state} Reason=None\n")
    monkeypatch.setenv("PATH", str(scontrol), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert requeue() is None
    assert calls(scontrol) == (["requeue 77"] if asked else [])


def test_a_container_without_scontrol_is_a_refusal_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert "scontrol" in (requeue() or "")


def _told_while_training(world: World, config: Path, run: Path, scontrol: Path, told: int) -> bool:
    """Fine-tune inside a step of Slurm; rank ``told`` hears SIGUSR1 before its first step. Whether the run left."""
    stage = stage_named("finetune")
    left: list[bool] = []

    def train(plan: Plan, opened: Run) -> None:
        if world.rank == told:
            os.kill(os.getpid(), signal.SIGUSR1)
        stage.train(plan, opened)
        left.append(opened.left)

    before = dict(os.environ)
    os.environ |= STEP | {"PATH": f"{scontrol}{os.pathsep}{os.environ['PATH']}"}
    try:
        cfg = load(stage.config, "finetune", str(config), [f"run.dir={run}", "tracking.uri=null"])
        enter(dataclasses.replace(stage, train=train), cfg, world)
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
    saved = [int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert not (run / "finished.json").exists()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, saved[0] + 1))
    assert two_ranks.call(_told_while_training, configs["finetune"], run, scontrol, -1) == [False, False]
    assert calls(scontrol) == ["requeue 77"]
    assert (run / "finished.json").exists()
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > saved[0]
