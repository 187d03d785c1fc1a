"""A run that was told to leave, and then lost a worker and a rank, is bit for bit the run that was left alone.

It reads in worker processes, and the run that was left alone does not.
"""

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from processes import Ended, column, rows_of
from safetensors.torch import load_file

from foveal.errors import TrainingHungError, WorkerLostError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # of real processes, each several seconds
_ASK = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


@dataclass(frozen=True)
class Attempt:
    """One start of the same ranks, and the run's state when they had ended. ``late``: signals to ranks that were done."""

    ended: list[Ended]
    steps: list[float]
    checkpoints: list[str]
    finished: bool
    late: int


@pytest.fixture(scope="module")
def attempts(long_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Attempt]]:
    """TERM to one of two ranks and USR1 to the other; KILL to a worker; KILL to a rank; and then nothing more."""
    run = replace(long_run, path=tmp_path_factory.mktemp("preempted") / "run", more=("data.workers=2",))
    found: list[Attempt] = []

    def attempt(strike: Callable[[Any], object], after: int | None, *, stays: bool) -> None:
        started = run.held_ranks(after=after, stay=stays)
        if after is not None:
            started.hold.wait_until_held()
            strike(started)
            started.hold.release()  # after the last signal: who sees it has its own signal already
        late = [(rank, number) for rank in range(2) for number in _ASK] if stays else []
        if stays:
            started.hold.wait_until_done()
            for rank, number in late:
                started.send(rank, number)
            started.hold.let_end()
        done = started.ended()
        steps = column(rows_of(run.path), "step")
        names = sorted(each.name for each in (run.path / "checkpoints").iterdir())
        found.append(Attempt(done, steps, names, (run.path / "finished.json").exists(), len(late)))

    def ask(ranks: Any) -> None:
        ranks.send(0, signal.SIGTERM)
        ranks.send(1, signal.SIGUSR1)

    attempt(ask, 5, stays=True)
    attempt(lambda ranks: ranks.kill_worker(1), 10, stays=False)
    attempt(lambda ranks: ranks.kill(1), 25, stays=False)
    attempt(lambda _: None, None, stays=True)
    return run.path, found


def test_a_signal_saves_and_exits_0(attempts, long_run) -> None:
    run, (attempt, *_) = attempts
    assert [rank.code for rank in attempt.ended] == [0, 0], attempt.ended
    assert not attempt.finished
    assert not any("Traceback" in rank.err for rank in attempt.ended)
    assert attempt.steps == [1, 2, 3, 4, 5]
    assert attempt.checkpoints == ["step-00000000-attempt-0001", "step-00000005-attempt-0001"]
    for rank, name in enumerate(("SIGTERM", "SIGUSR1")):
        log = (run / "logs" / f"rank-{rank:03d}.log").read_text()
        assert f"asked to leave ({name}): saved at step 5 of {long_run.steps}" in log


def test_a_lost_worker_ends_all_ranks(attempts) -> None:
    run, (_, lost, *_) = attempts
    assert [rank.code for rank in lost.ended] == [WorkerLostError.exit_code] * 2, lost.ended
    sentence = (
        r"stopped by WorkerLostError: a process of the loader \(worker 1, pid \d+\) was killed by SIGKILL while it"
    )
    for rank in range(2):
        assert re.search(sentence, (run / "logs" / f"rank-{rank:03d}.log").read_text())


def test_a_lost_rank_ends_the_others(attempts) -> None:
    _, (_, _, lost, last) = attempts
    assert [rank.code for rank in lost.ended] == [TrainingHungError.exit_code, -signal.SIGKILL]
    assert not lost.finished
    assert not [name for name in last.checkpoints if not name.startswith("step-")]


def test_the_same_command_goes_on_to_the_same_curve(attempts, long_run) -> None:
    run, (*_, last) = attempts
    assert [rank.code for rank in last.ended] == [0, 0], last.ended
    assert "resumed from" in last.ended[0].err
    ours, theirs = rows_of(run), rows_of(long_run.path)
    assert column(ours, "step") == list(range(1, long_run.steps + 1))
    for name in ("loss", "grad_norm", "lr"):
        assert column(ours, name) == column(theirs, name), name


def test_the_same_command_leaves_the_same_weights(attempts, long_run) -> None:
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (attempts[0], long_run.path))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_signal_after_the_end_changes_nothing(attempts) -> None:
    """Of a run that has left as of one that is finished: a job that has asked for its next start must not fail."""
    _, (left, _, _, finished) = attempts
    for attempt in (left, finished):
        assert attempt.late == 2 * len(_ASK)
        assert [rank.code for rank in attempt.ended] == [0, 0], attempt.ended


@pytest.mark.thorough
def test_ctrl_c_on_one_rank_ends_both(long_run, tmp_path: Path) -> None:
    """A person asks, of whichever rank: both save, neither asks Slurm for another start, and nobody waits for that."""
    run = replace(long_run, path=tmp_path / "run")
    started = run.held(after=5)
    started.hold.wait_until_held()
    os.kill(started.ranks()[1], signal.SIGINT)
    started.hold.release()
    done = started.ended()
    assert done.code == 0, done.err
    for rank, who in enumerate(("another rank", "SIGINT")):
        log = (run.path / "logs" / f"rank-{rank:03d}.log").read_text()
        assert f"asked to leave ({who}): saved at step 5 of {run.steps}" in log
    assert (run.path / "checkpoints" / "step-00000005-attempt-0001").is_dir()


@pytest.mark.thorough
def test_ctrl_c_of_a_local_pipeline(pipeline) -> None:
    """Its stage of two processes saves and leaves, nothing after it starts, and the same command goes on."""
    assert pipeline.interrupted.code == 128 + signal.SIGINT
    assert pipeline.begun == ["pretrain"]
    assert pipeline.interrupted.err.splitlines()[-1] == "foveal: stopped in stage 'pretrain': start again to continue"
    log = (pipeline.runs / "pretrain" / "logs" / "rank-001.log").read_text()
    assert "asked to leave (SIGINT): saved at step " in log
    assert "resumed from " in log
    assert column(rows_of(pipeline.runs / "pretrain"), "step") == list(range(1, 89))


@pytest.mark.thorough
def test_a_pipeline_that_was_interrupted_has_the_curve_of_one_that_was_not(pipeline, long_run) -> None:
    ours, theirs = rows_of(pipeline.runs / "pretrain"), rows_of(long_run.path)
    assert column(ours, "loss") == column(theirs, "loss")
