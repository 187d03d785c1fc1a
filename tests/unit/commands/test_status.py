"""`foveal status`: what it says of a run and of a folder, in 80 columns, as JSON, again and again, and of nothing."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, ROOT, Started, lone
from run_directories import begin_attempt, end_attempt, leave_without_word, make_run, save_checkpoint, steps
from screen import read_screen

from foveal.commands import status as command
from foveal.commands.status import status_command
from foveal.errors import CheckpointError, ConfigError
from foveal.runs.job_lookup import JobLookup
from foveal.runs.overview import Overview
from foveal.runs.pipeline import PlannedStage, write_pipeline
from foveal.slurm import SlurmJobStatus

DOCS = ROOT / "docs/status.md"
JOB = SlurmJobStatus("7", "RUNNING", "None", "main", "", False, 7200.0, 600.0, None, "node[1-2]")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str], *words: object, **options: bool) -> list[str]:
    status_command([str(word) for word in words], **options)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def labelled(lines: list[str]) -> dict[str, str]:
    """The text of each label; lines without one go on with the one before."""
    texts: dict[str, str] = {}
    label = ""
    first = next(number for number, line in enumerate(lines) if line.startswith("state"))
    for line in lines[first:]:
        label = line.split(" ")[0] or label
        texts[label] = f"{texts.get(label, '')} {line[line.index(' ') :].strip()}".strip()
    return texts


def test_a_run_under_way_is_told_in_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.time() - 40
    evaluated = {"step": 30, "val_loss": 0.5, "val_top1": 0.62, "time": begin + 30}
    rows = steps(1, 40, begin=begin)
    run = make_run(tmp_path / "run", stop_step=80, rows=[*rows[:30], evaluated, *rows[30:]])
    end_attempt(run, "asked to leave (SIGTERM): saved at step 0 of 100")
    lease = begin_attempt(run)
    save_checkpoint(run, 30, 2)
    lines = said(capsys, run)
    lease.record_end_and_release("", 0)
    assert all(len(line) <= 80 for line in lines)
    assert "".join(lines[:3]).replace(" ", "").startswith(f"{run}(pretrain)"), "a long path is wrapped"
    texts = labelled(lines)
    assert re.fullmatch(r"running for \d s, attempt 2, 2 ranks on \S+", texts["state"])
    assert texts["step"] == "40 of 100 (40%), epoch 4 of 10"
    assert texts["loss"].startswith("0.0250; mean 0.0")
    assert texts["rates"] == "140 images/s, data wait 25%, learning rate 0.001"
    assert texts["evaluated"] == "after step 30: val_loss 0.5000, val_top1 0.6200"
    assert texts["best"] == "val_top1 0.6200 after step 30 (higher is better)"
    assert re.fullmatch(r"step 30, \d s ago", texts["saved"])
    assert texts["attempts"] == "2; the last that ended: asked to leave (SIGTERM): saved at step 0 of 100"
    assert re.fullmatch(r"last row \d+ s ago, heartbeat \d s ago", texts["signs"])


def test_the_end_of_a_run_says_why_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", rows=steps(1, 40, begin=0.0))
    end_attempt(run, "rank 0 ran out of memory: lower batch.max_micro_size", 2)
    (run / "refused.jsonl").write_text("{}\n")
    texts = labelled(said(capsys, run))
    assert texts["state"].startswith("failed, attempt 1")
    assert texts["because"] == "rank 0 ran out of memory: lower batch.max_micro_size"
    assert texts["next"] == "remove the cause; then the same command starts it again"
    assert texts["incidents"] == "1 refused update (refused.jsonl)"
    save_checkpoint(run, 30)
    assert labelled(said(capsys, run))["next"].endswith("goes on after step 30")


def test_trials_that_are_finished_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", stage="finetune", num_runs=4)
    lease = begin_attempt(run)
    end_attempt(make_run(run / "trials" / "one", finished={"val_top1": 0.5, "step": 5}))
    inner = make_run(run / "trials" / "two", rows=steps(1, 10, begin=time.time()))
    inner_lease = begin_attempt(inner)
    lines = said(capsys, run)
    assert labelled(lines)["trials"] == "1 of 4 finished two: step 10 of 100, loss 0.1000"
    for each in (inner_lease, lease):
        each.record_end_and_release("asked to leave (SIGTERM): at 2", 0)
    assert labelled(said(capsys, run))["next"] == "the same command goes on; 1 finished trial will not be repeated"


def test_slurm_and_another_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    leave_without_word(run, job="7")
    monkeypatch.setattr(command, "JobLookup", lambda: JobLookup(lambda *_: JOB))
    texts = labelled(said(capsys, run))
    assert texts["state"].startswith("running for")
    assert texts["slurm"] == "job 7 is RUNNING on node[1-2], 1 h 50 min to its time limit"


def test_a_folder_is_a_table_of_its_runs_and_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [PlannedStage(name, name, tmp_path / name) for name in ("pretrain", "distill", "finetune")]
    write_pipeline(tmp_path, stages)
    end_attempt(make_run(tmp_path / "pretrain", finished={"step": 100, "val_knn_top1": 0.71}))
    lease = begin_attempt(make_run(tmp_path / "distill", stage="distill", rows=steps(1, 40, begin=time.time())))
    lines = said(capsys, tmp_path)
    lease.record_end_and_release("a bug", 1)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["run", "state", "step", "best", "or", "loss", "left", "seen"]
    assert lines[1].split()[:6] == ["pretrain", "finished", "100", "of", "100", "val_knn_top1"]
    assert lines[2].split()[:7] == ["distill", "running", "40", "of", "100", "loss", "0.0250"]
    assert lines[3].split() == ["finetune", "not", "begun"]
    assert said(capsys, tmp_path)[-1] == "distill: a bug"


def test_names_move_no_cursor_and_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\x1b[2J\nb", "<script>alert('ü')</script>", "[red]x[/red]"):
        run = make_run(tmp_path / name.replace("/", "|"))
        end_attempt(run, "why \x1b[31m\n[bold]", 1)
        for target in (run, tmp_path):
            written = "".join(said(capsys, target))
            assert "\x1b" not in written
            assert "[bold]" in written
    assert "[red]x[|red]" in "".join(said(capsys, tmp_path)).replace(" ", "")


def test_json_has_the_documented_keys_of_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*steps(1, 9, begin=0.0), {"step": 10, "loss": float("nan"), "lr": float("inf"), "time": 10.0}]
    run = make_run(tmp_path / "run", stage="finetune", num_runs=3, rows=rows)
    leave_without_word(run, beat_age=3600.0, job="7")
    write_pipeline(tmp_path, [PlannedStage("two", "distill", tmp_path / "two")])
    status_command([str(tmp_path)], as_json=True)
    tree = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(tree) == ["path", "time", "runs", "not_begun", "unreadable"]
    (entry,) = tree["runs"]
    assert (entry["state"], entry["loss"], entry["lr"], entry["parts"]["total"]) == ("unknown", None, None, 3)
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE))
    assert set(entry) | set(tree) <= documented, "docs/status.md lists the keys"
    status_command([str(run)], as_json=True)
    alone = json.loads(capsys.readouterr().out)["runs"][0]
    assert alone.keys() == entry.keys()


def test_without_an_argument_the_runs_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder runs"):
        said(capsys)
    Path("runs").mkdir()
    with pytest.raises(CheckpointError, match="runs is no run that was ever started"):
        said(capsys)
    end_attempt(make_run(tmp_path / "runs" / "one"))
    assert "saved and left" in " ".join(said(capsys))
    monkeypatch.chdir(tmp_path / "runs" / "one")
    assert said(capsys)[0] == "one (pretrain)"
    assert "saved and left" in " ".join(said(capsys))


def test_bad_input_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        ((tmp_path / "nowhere",), "no such folder"),
        ((DOCS,), "is a file"),
        (("a", "b"), "one run or folder is expected"),
        (("5",), "no such folder"),  # a number is an interval with --watch only
    ):
        with pytest.raises((CheckpointError, ConfigError), match=sentence) as error:
            said(capsys, *words)
        assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="seconds from"):
        said(capsys, "0", watch=True)


def test_watching_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    lease, waits = begin_attempt(run), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            lease.record_end_and_release("finished early", 0, 7)

    monkeypatch.setattr(command.time, "sleep", sleep)
    lines = said(capsys, "7", run, watch=True)
    assert waits == [7.0, 7.0]
    assert [line.split()[1] for line in lines if line.startswith("state")] == ["running", "running", "saved"]
    status_command([str(run)], watch=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "saved-and-left"


def test_watching_bears_storage_that_is_away_for_a_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    lease, looks, read = begin_attempt(run), [], command.read_overview

    def look(*arguments: Any) -> Overview:
        looks.append(1)
        if len(looks) == 2 or len(looks) > 4:
            raise OSError(116, "Stale file handle")
        return read(*arguments)

    monkeypatch.setattr(command, "read_overview", look)
    monkeypatch.setattr(command.time, "sleep", lambda _: None)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        said(capsys, run, watch=True)
    assert len(looks) == 4 + 11
    lease.record_end_and_release("", 0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        said(capsys, run)


def test_on_a_terminal_it_refreshes_in_place_and_ctrl_c_is_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease = begin_attempt(run)
    terminal, inside = pty.openpty()
    words = [sys.executable, "-m", "foveal.cli", "status", str(run), "--watch", "0.1"]
    environment = lone(tmp_path) | {"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdin=inside, stdout=inside, stderr=inside, cwd=tmp_path, env=environment)
    os.close(inside)
    written, patience, is_asked = b"", time.monotonic() + PATIENCE, False
    with contextlib.suppress(OSError):  # the other end is closed
        while time.monotonic() < patience:
            if select.select([terminal], [], [], 0.05)[0]:
                written += os.read(terminal, 1 << 16)
            if not is_asked and written.count(b"running for") >= 3:
                process.send_signal(signal.SIGINT)
                is_asked = True
    lease.record_end_and_release("", 0)
    assert is_asked, written.decode()
    assert process.wait(PATIENCE) == 0
    os.close(terminal)
    screen = "\n".join(read_screen(written.decode()))
    assert screen.count("running for") == 1
    assert "Traceback" not in screen


def test_it_starts_fast_and_without_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=steps(1, 40, begin=0.0))
    end_attempt(run)
    code = (
        "import sys; from foveal.commands.status import status_command; import foveal.commands.runs as r\n"
        "status_command([sys.argv[1]]); r.runs_command(None)\n"
        "print(sorted({'torch', 'numpy', 'mlflow', 'timm'} & set(sys.modules)))"
    )
    (tmp_path / "runs").symlink_to(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_real_run_is_seen_from_another_process(digits: Path, tmp_path: Path) -> None:
    """States, steps and times of a training under way, then of the same run killed."""
    run = tmp_path / "runs" / "digits"
    settings = [
        f"data.path={digits}",
        f"run.dir={run}",
        "tracking.uri=null",
        "epochs=400",
        "engine.kind=plain",
        "log.every=2",
    ]
    training = Started(
        [sys.executable, "-m", "pretrain.run", str(ROOT / "configs/pretrain/digits.yaml"), *settings], ROOT
    )
    training.reaches(run, 6)

    def look() -> dict[str, object]:
        words = [sys.executable, "-m", "foveal.cli", "status", "runs", "--json"]
        environment = lone(tmp_path) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
        return json.loads(done.stdout)["runs"][0]

    seen = look()
    assert (seen["stage"], seen["state"], seen["stalled"], seen["total_steps"]) == ("pretrain", "running", False, 2000)
    assert isinstance(seen["step"], int)
    assert 6 <= seen["step"] < 2000
    assert isinstance(seen["seconds_left"], float)
    os.killpg(training.process.pid, signal.SIGKILL)
    training.ended()
    seen = look()
    assert (seen["state"], seen["seconds_left"]) == ("killed", None)
    assert "process" in str(seen["reason"])
