"""Which run of MLflow a folder goes on in: its own, wherever it is moved; a copy has another."""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from points import in_jsonl, in_mlflow, row, run_id

from foveal.commands.track import app as track_commands
from foveal.tracking import mlflow_runs, open_tracker
from foveal.tracking.mlflow import MLflowRun
from foveal.tracking.sqlite_store import resolve_store_of_run
from foveal.tracking.store_errors import explain_refusal
from foveal.tracking.tracker import TrackingConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def goes_on(run: Path, uri: str, first: int, last: int, pipeline: Path | None = None) -> str:
    """An attempt from one step to another; the run in MLflow that has it."""
    tracker, _ = open_tracker(run, TrackingConfig(uri=uri), str(pipeline) if pipeline else None, first - 1)
    tracker.log_settings({}, {})
    tracker.log_rows([row(step) for step in range(first, last + 1)])
    tracker.close("finished")
    return run_id(run)


def plain_copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to, symlinks=True)


def linked_copy(source: Path, to: Path) -> None:
    """As `cp -al`: the note of both is one file on disk."""
    shutil.copytree(source, to, copy_function=os.link)


def of_old(source: Path, to: Path) -> None:
    """As foveal 0.1 left it: the note names no folder, the run's tag does."""
    note = source / "mlflow.json"
    note.write_text(
        json.dumps({name: value for name, value in json.loads(note.read_text()).items() if name != "folder"})
    )
    plain_copy(source, to)


@pytest.mark.parametrize("copy", [plain_copy, linked_copy, of_old])
def test_a_copy_that_goes_on_beside_its_original(tmp_path: Path, uri: str, copy: Callable[[Path, Path], None]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    mine = goes_on(run, uri, 1, 10)
    copy(run, other)
    theirs = goes_on(other, uri, 11, 20)
    assert theirs != mine
    assert goes_on(run, uri, 11, 20) == mine
    assert (goes_on(other, uri, 16, 20), goes_on(run, uri, 21, 25)) == (theirs, mine)
    client = MlflowClient(uri)
    for each in (run, other):
        assert in_mlflow(client, each) == in_jsonl(each), "each number once"
        assert client.get_run(run_id(each)).data.tags["foveal.folder"] == str(each)
    assert goes_on(shutil.copytree(other, tmp_path / "third"), uri, 21, 25) not in (mine, theirs)


def test_a_moved_folder_goes_on_in_its_run(tmp_path: Path, uri: str) -> None:
    """Also where something else has its old place since."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    mine = goes_on(run, uri, 1, 10)
    run.rename(moved)
    assert goes_on(moved, uri, 11, 15) == mine
    assert MlflowClient(uri).get_run(mine).data.tags["foveal.folder"] == str(moved)
    of_old(moved, run)
    shutil.rmtree(moved)
    assert goes_on(run, uri, 16, 20) == mine
    run.rename(moved)
    assert goes_on(run, uri, 1, 5) != mine
    assert goes_on(moved, uri, 21, 25) == mine


def test_a_run_that_is_started_elsewhere_goes_on_in_its_store(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A relative path is that of the first attempt's working directory, also for `foveal track sync` and for a copy."""
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "first" / "run"
    stated, store = "sqlite:///runs/mlflow.db", first / "runs" / "mlflow.db"
    for folder in (first, second):
        folder.mkdir()
    monkeypatch.chdir(first)
    store.parent.mkdir()
    shutil.copy(uri.removeprefix("sqlite:///"), store)  # a store takes seconds to make
    mine = goes_on(run, stated, 1, 5)
    note = json.loads((run / "mlflow.json").read_text())
    assert (note["store"], note["file"]) == (stated, str(store))
    monkeypatch.chdir(second)
    with caplog.at_level(logging.INFO, "foveal"):
        assert goes_on(run, stated, 6, 10) == mine
    assert f"{run} goes on in {store}, its store since its first attempt" in caplog.text
    (run / "config.yaml").write_text(f"tracking: {{uri: '{stated}'}}\n")
    track_commands(["sync", str(run)], standalone_mode=False)
    copy = shutil.copytree(run, second / "copy")
    theirs = goes_on(copy, stated, 11, 15)
    assert theirs != mine
    assert goes_on(copy, stated, 16, 20) == theirs
    assert goes_on(run, f"sqlite:///{store}", 11, 15) == mine  # the same file
    client = MlflowClient(f"sqlite:///{store}")
    assert [in_mlflow(client, each) == in_jsonl(each) for each in (run, copy)] == [True, True]
    assert not (second / "runs").exists()
    store.unlink()  # moved away, or of another host: the path starts here
    resolved = resolve_store_of_run(stated, str(store))
    assert (resolved, resolve_store_of_run("sqlite:///other.db", str(store))) == (stated, "sqlite:///other.db")


def test_other_names_of_one_folder(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, and a mount: another host notes another path, and each sees what the other makes."""
    run, link = tmp_path / "run", tmp_path / "link"
    mine = goes_on(run, uri, 1, 10)
    link.symlink_to(run)
    assert goes_on(link, uri, 11, 15) == mine
    monkeypatch.setattr(Path, "resolve", Path.absolute)  # as a bind mount, which no name gives away
    assert goes_on(link, uri, 16, 20) == mine
    assert json.loads((run / "mlflow.json").read_text())["folder"] == str(link)
    assert goes_on(run, uri, 21, 25) == mine
    assert not list(run.glob(".mlflow.json.*"))


def test_a_place_that_may_not_be_looked_into(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    mine = goes_on(run, uri, 1, 10)
    plain_copy(run, other)
    read = mlflow_runs._read_note

    def barred(note: Path) -> dict[str, str] | None:
        if note == run / "mlflow.json":
            raise PermissionError(13, "no")
        return read(note)

    monkeypatch.setattr(mlflow_runs, "_read_note", barred)
    assert goes_on(other, uri, 11, 15) != mine


def test_a_copy_of_a_pipeline_has_a_parent_of_its_own(tmp_path: Path, uri: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    goes_on(one / "pretrain", uri, 1, 5, one)
    plain_copy(one, two)
    goes_on(two / "pretrain", uri, 6, 9, two)
    goes_on(one / "pretrain", uri, 6, 9, one)
    client = MlflowClient(uri)
    parents = [client.get_run(run_id(each / "pretrain")).data.tags["mlflow.parentRunId"] for each in (one, two)]
    assert parents == [run_id(one), run_id(two)]
    assert run_id(one) != run_id(two)


def test_a_run_and_an_experiment_in_the_trash(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run, client, cfg = tmp_path / "run", MlflowClient(uri), TrackingConfig(uri=uri, experiment="short-lived")
    first = MLflowRun(cfg, run, None, "a").run_id
    client.delete_run(first)
    with caplog.at_level(logging.INFO, "foveal"):
        assert MLflowRun(cfg, run, None, "b").run_id != first
    assert f"{run} has a new run in MLflow, since that of its mlflow.json is deleted" in caplog.text
    experiment = client.get_experiment_by_name(cfg.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(Exception, match=r"^experiment short-lived is deleted: restore it or name another") as caught:
        MLflowRun(cfg, run, None, "c")
    assert isinstance(caught.value, Exception) and explain_refusal(caught.value) == str(caught.value)
    client.restore_experiment(experiment.experiment_id)
    assert MLflowRun(cfg, run, None, "d").run_id


def test_a_store_of_another_mlflow_is_an_answer(tmp_path: Path, uri: str) -> None:
    MLflowRun(TrackingConfig(uri=uri), tmp_path / "any", None, "x")
    store = tmp_path / "mlflow.db"
    shutil.copy(uri.removeprefix("sqlite:///"), store)
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
    with pytest.raises(MlflowException) as caught:
        MLflowRun(TrackingConfig(uri=f"sqlite:///{store}"), tmp_path / "run", None, "x")
    assert (explain_refusal(caught.value) or "").startswith(
        "its tables are those of another MLflow (MlflowException: Detected"
    )


def test_a_variable_instead_of_a_secret_is_the_same_store(tmp_path: Path, uri: str, monkeypatch) -> None:
    run = tmp_path / "run"
    mine = goes_on(run, f"{uri}?timeout=9", 1, 5)
    monkeypatch.setenv("THE_STORE", f"{uri}?timeout=9")
    assert goes_on(run, "${THE_STORE}", 6, 9) == mine
    monkeypatch.delenv("THE_STORE")
    with pytest.raises(Exception, match="needs the environment variable THE_STORE, which is not set"):
        MLflowRun(TrackingConfig(uri="${THE_STORE}"), run, None, "x")
