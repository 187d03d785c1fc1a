"""`foveal runs`: a table in 80 columns, more in a wide terminal, JSON for scripts, and hundreds of runs in seconds."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from processes import ROOT
from run_directories import end_attempt, make_run, steps

from foveal.commands.runs import runs_command
from foveal.errors import CheckpointError, ConfigError

DOCS = ROOT / "docs/status.md"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    end_attempt(make_run(tmp_path / "mae", finished={"step": 100, "val_loss": 0.25}))
    end_attempt(make_run(tmp_path / "tuned", stage="finetune", finished={"step": 100, "val_top1": 0.75}))
    end_attempt(make_run(tmp_path / "tuned/folds/one", stage="finetune", finished={"step": 9, "fold_top1": 0.5}))
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_table_with_the_best_numbers(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_command(runs)
    table = lines(capsys)
    assert table[0].split() == ["run", "stage", "state", "step", "best", "started"]
    assert table[1].split()[:7] == ["mae", "pretrain", "finished", "100", "val_loss", "0.2500", "↓"]
    assert "val_top1 0.7500 ↑" in table[2]
    assert all(len(line) <= 80 for line in table)
    monkeypatch.setenv("COLUMNS", "140")
    runs_command(runs, sort="name", size=True, all_runs=True)
    table = lines(capsys)
    assert table[0].split()[-4:] == ["time", "data", "model", "size"]
    assert [line.split()[0] for line in table[1:]] == ["mae", "tuned", "tuned/folds/one"]
    assert "digits  vit_tiny_patch16_224" in table[1]
    assert table[1].endswith("MB")


def test_one_stage_and_no_stage(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs_command(runs, stage="finetune")
    assert [line.split()[0] for line in lines(capsys)] == ["run", "tuned"]
    runs_command(runs, stage="distill", as_json=True)
    assert json.loads(capsys.readouterr().out)["runs"] == []
    with pytest.raises(ConfigError, match="--stage evaluate: there is no such stage; there are pretrain"):
        runs_command(runs, stage="evaluate")
    with pytest.raises(CheckpointError, match="no such folder"):
        runs_command(runs / "nowhere", stage="distill")


def test_json_has_the_documented_keys(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "mae" / "plan.json").write_text("[")
    runs_command(runs, as_json=True, all_runs=True, size=True)
    tree = json.loads(capsys.readouterr().out)
    assert [run["outer"] and Path(run["outer"]).name for run in tree["runs"]] == [None, "tuned"]
    assert [Path(run["path"]).name for run in tree["unreadable"]] == ["mae"]
    assert set(tree["runs"][0]) <= set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE))


def test_hundreds_of_runs_take_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = steps(1, 200, begin=0.0)
    end_attempt(make_run(tmp_path / "runs" / "0", rows=rows))
    for number in range(1, 300):
        shutil.copytree(tmp_path / "runs" / "0", tmp_path / "runs" / str(number))
    begin = time.process_time()
    runs_command(tmp_path / "runs")
    assert len(lines(capsys)) == 301
    assert time.process_time() - begin < 10.0  # 2 s of an idle core
