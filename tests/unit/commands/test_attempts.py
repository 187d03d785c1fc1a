"""`foveal attempts`: why each start ended, in words, and in a terminal of 80 columns."""

import json
from pathlib import Path

import pytest

from foveal.commands.attempts import attempts
from foveal.errors import CheckpointError
from foveal.training.lease import acquire_lease
from foveal.training.lease_holder import current_holder

ENDS = [
    ("pretrain ran out of memory on rank 0, with 8 images per forward: lower batch.max_micro_size (8)", 2),
    ("a bug", 1),
    ("asked to leave (SIGTERM): saved at step 5 of 9", 0),
    ("finished early, at step 7 of 9", 0),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of several attempts, the last of which has finished it."""
    for reason, code in ENDS:
        lease = acquire_lease(tmp_path / "run", current_holder(2), max_attempts_without_progress=9)
        lease.record_start(0)
        lease.record_end_and_release(reason, code, 7)
    summary = {"step": 7, "loss": 0.51, "lr": 1e-3, "images_per_second": 9.5, "top1": 0.987654, "best_step": 4}
    (tmp_path / "run" / "finished.json").write_text(json.dumps({"summary": summary}))
    return tmp_path / "run"


def lines_of(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    attempts(run)
    return capsys.readouterr().out.splitlines()


def test_every_start_has_a_row_and_a_reason(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = lines_of(run, capsys)
    assert lines[0].split() == ["attempt", "started", "ranks", "steps", "time", "code", "where"]
    assert len(lines) == 1 + 2 * len(ENDS) + 1
    assert all("0 to 7" in line and len(line) <= 80 for line in lines[1:5])
    reasons = [f"refused: {ENDS[0][0]}", "failed: a bug", ENDS[2][0], f"{ENDS[3][0]} (loss 0.51, top1 0.9877)"]
    assert lines[-4:] == [f"{number}: {reason}" for number, reason in enumerate(reasons, 1)]


def test_an_attempt_without_an_end_runs_or_was_killed(run: Path, capsys) -> None:
    lease = acquire_lease(run, current_holder(1), max_attempts_without_progress=9)
    assert lines_of(run, capsys)[-1] == "5: running"
    file = run / "attempts" / "0005.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"born": f"{facts['born'].rpartition(' ')[0]} 1"}))
    assert lines_of(run, capsys)[-1].startswith("5: killed by a signal, or its node was lost: process ")
    file.write_text(json.dumps(facts | {"host": "elsewhere"}))
    assert lines_of(run, capsys)[-1].startswith("5: no record of its end: it is running on another host")
    lease.record_end_and_release("", 0)
    assert lines_of(run, capsys)[-1].startswith("5: finished (")
    (run / "finished.json").unlink()
    assert lines_of(run, capsys)[-1] == "5: finished, or reached run.stop_at_step"


def test_results_come_before_the_last_training_step(run: Path, capsys) -> None:
    results = {f"result_{number}": number / 10 for number in range(1, 6)}
    for summary in (results | {"step": 7, "loss": 0.5}, {"step": 7, "loss": 0.5} | results):  # since 0.2, and before
        (run / "finished.json").write_text(json.dumps({"summary": summary}))
        assert "result_4 0.4" in (line := lines_of(run, capsys)[-1])
        assert "loss" not in line


def test_what_is_no_run_is_a_sentence(run: Path) -> None:
    for folder, sentence in (
        (run / "nowhere", "no such folder"),
        (run / "finished.json", "is a file"),
        (run.parent, f"is no run, it holds 1: {run}"),
        (run / "attempts", "is no run that was ever started"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            attempts(folder)


def test_what_a_run_says_is_text_and_no_command_to_a_terminal(run: Path, capsys) -> None:
    lease = acquire_lease(run, current_holder(1), max_attempts_without_progress=9)
    lease.record_end_and_release("bad [bold]\x1b[2J\nnews", 1)
    file = run / "attempts" / "0005.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "[/red]h\x1b"}))
    lines = lines_of(run, capsys)
    assert "[/red]h?" in lines[5]
    assert lines[-1] == "5: failed: bad [bold]?[2J?news"
