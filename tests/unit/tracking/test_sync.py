"""``foveal track sync``: what it takes its settings from, and what it says when it cannot."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from points import in_jsonl, in_mlflow, row, run_id

from foveal import cli
from foveal.tracking.jsonl import JsonlTracker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def left(run: Path, state: str = "finished", **tracking: Any) -> Path:
    """A run that was trained without a word to MLflow."""
    kept = JsonlTracker(run, 0)
    kept.log_settings({"epochs": 3}, {"ranks": "1"})
    kept.log_rows([row(step) for step in range(1, 31)])
    if state != "running":
        kept.close("finished")
    else:
        kept._stream.close()
    place = {"dir": os.path.relpath(run), "pipeline": os.path.relpath(run.parent)}
    (run / "config.yaml").write_text(json.dumps({"tracking": tracking, "run": place}))
    return run


def track(monkeypatch: pytest.MonkeyPatch, capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["foveal", "track", "sync", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_from_another_folder_and_twice(tmp_path: Path, monkeypatch, capsys) -> None:
    """The settings' paths begin where the run was started; the store's is absolute."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    run = left(tmp_path / "runs" / "demo" / "pretrain", uri=store)
    monkeypatch.chdir(run)
    assert track(monkeypatch, capsys, ".") == (0, ".: 30 rows and 2 files delivered, 0 rows were there\n", "")
    assert track(monkeypatch, capsys, run) == (0, f"{run}: 0 rows and 2 files delivered, 30 rows were there\n", "")
    client = MlflowClient(store)
    assert in_mlflow(client, run) == in_jsonl(run)
    parent = client.get_run(client.get_run(run_id(run)).data.tags[MLFLOW_PARENT_RUN_ID])
    assert (parent.info.run_name, parent.info.run_id) == ("demo", run_id(tmp_path / "runs" / "demo"))
    assert client.get_run(run_id(run)).info.status == "FINISHED"


def test_an_attempt_that_could_not_say_how_it_ended(tmp_path: Path, monkeypatch, capsys) -> None:
    run = left(tmp_path / "run", state="running", uri=f"sqlite:///{tmp_path}/mlflow.db")
    attempts = run / "attempts"
    attempts.mkdir()
    (attempts / "0001.json").write_text(json.dumps({"host": "n1", "pid": 1, "born": "", "ranks": 1, "time": 1.0}))
    assert track(monkeypatch, capsys, run)[0] == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(run_id(run)).data.tags["state"] == "running"
    (attempts / "0001.end.json").write_text(
        json.dumps({"why": "rank 1 was lost", "code": 5, "step": 30, "seconds": 1.0})
    )
    assert track(monkeypatch, capsys, run)[0] == 0
    found = client.get_run(run_id(run))
    assert (found.info.status, found.data.tags["state"]) == ("FAILED", "failed")
    assert found.data.tags["why_stopped"] == "rank 1 was lost"


def test_trials_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    run = left(tmp_path / "run", uri=f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("bad", "good", "worse"):
        left(run / "trials" / name)
    (run / "trials" / "bad" / "metrics.jsonl").write_text("{\n")
    (run / "trials" / "worse" / "tags.json").write_text("{")
    code, out, err = track(monkeypatch, capsys, run)
    assert (code, out) == (2, f"{run} (with 3 runs in it): 60 rows and 4 files delivered, 0 rows were there\n")
    last = err.splitlines()[-1]
    assert f"2 runs in {run} were not delivered (see above): {run}/trials/bad, {run}/trials/worse" in last
    assert in_mlflow(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), run / "trials" / "good") == in_jsonl(run)


def test_a_mistake_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = tmp_path / "nothing"
    none, relative = left(tmp_path / "none", uri=None), left(tmp_path / "relative", uri="sqlite:///runs/mlflow.db")
    away = left(tmp_path / "away", uri="http://127.0.0.1:9", flush_timeout_seconds=0.0)
    empty = left(tmp_path / "empty", uri="http://127.0.0.1:9")
    (empty / "metrics.jsonl").unlink()
    user = "me:secret"
    secret = ("--uri", f"http://{user}@there")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((nothing,), f"{nothing} is no run directory (it has no config.yaml)"),
        ((none,), f"{none}/config.yaml: tracking.uri is null, so the run has no MLflow; name one with --uri"),
        ((relative,), "there is no runs/mlflow.db here; give the command where the run was started, or name the store"),
        ((away,), f"{away} was not delivered: MLflow at http://127.0.0.1:9 does not take it"),
        ((empty,), f"{empty} has no metrics.jsonl: the run has not begun"),
        ((away, *secret), "--uri: uri: the URI holds a password"),
    ]
    for words, sentence in cases:
        code, out, err = track(monkeypatch, capsys, *words)
        assert (code, out) == (2, ""), words
        assert err.splitlines()[-1].startswith("foveal: "), err
        assert sentence in err
        assert "secret" not in err
    assert not (tmp_path / "runs").exists()
