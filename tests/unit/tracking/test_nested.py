"""Trials and folds reach the store through the outer run's uploader: each once, as its children, whatever fails."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from nested_stores import Stores, check_delivered, steps
from points import in_jsonl, in_mlflow, row, run_id
from uploads import WAIT, until

from foveal.atomic import write_json
from foveal.commands.track import sync
from foveal.errors import ConfigError
from foveal.tracking import nested, open_tracker, uploader
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.nested import list_nested
from foveal.tracking.nested_tracker import NestedTracker, OuterTracker
from foveal.tracking.sync import MetricsFileReplaced
from foveal.tracking.tracker import TrackingConfig


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, seconds in {"_ROUND_SECONDS": 0.0, "_MIN_WAIT": 0.002, "_MAX_WAIT": 0.01}.items():
        monkeypatch.setattr(uploader, name, seconds)
    caplog.set_level(logging.INFO, "foveal")


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path / "run")
    yield stores
    for jsonl in stores.opened:
        jsonl._stream.close()


def begin_trial(outer: OuterTracker, name: str, start: int = 0) -> NestedTracker:
    folder = outer.sync._run_dir / "trials" / name
    tracker = outer.add_nested(folder, JsonlTracker(folder, start))
    assert isinstance(tracker, NestedTracker)
    tracker.log_settings({"seed": 1}, {"attempt.started": f"{name} {start}"})
    return tracker


def do_trial(outer: OuterTracker, name: str, first: int = 1, last: int = 3) -> None:
    tracker = begin_trial(outer, name, first - 1)
    for step in range(first, last + 1):
        tracker.log_rows([row(step)])
    write_json(outer.sync._run_dir / "trials" / name / "finished.json", {})
    tracker.log_file(outer.sync._run_dir / "trials" / name / "finished.json")
    tracker.close("finished")


def test_every_trial_arrives_and_the_outer_run_waits_once(stores: Stores) -> None:
    outer = stores.begin()
    outer.log_settings({"a": 1}, {})
    for number in range(40):
        do_trial(outer, f"t{number}")
    outer.log_results_once({"top1": 0.5}, 40)
    outer.close("finished")
    assert len(list_nested(stores.run)) == 40
    for number in range(40):
        check_delivered(stores, f"t{number}")
    assert stores.of("run").tags["state"] == "finished"
    assert len(stores.connections) <= 41 + nested._MAX_OPEN, "a trial is connected to once, or few are twice"
    assert not outer.sync._open


def test_a_trial_under_way_is_seen(stores: Stores) -> None:
    outer = stores.begin()
    outer.log_settings({}, {})
    trial = begin_trial(outer, "long")
    trial.log_rows([row(1)])
    until(lambda: steps(stores, "long") == {1})
    assert stores.of("long").tags["state"] == "running"
    trial.log_rows([row(2)])
    until(lambda: steps(stores, "long") == {1, 2})
    trial.rewind(1)
    trial.log_rows([row(2), row(3)])
    trial.close("diverged")
    outer.close("failed")
    assert steps(stores, "long") == {1, 2, 3}
    assert stores.of("long").tags["state"] == "diverged"


@pytest.mark.parametrize("seed", range(4))
def test_each_number_once_whatever_fails(seed: int, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "_MAX_OPEN", 2)
    trouble = random.Random(seed)

    def fail(verb: str) -> None:
        if trouble.random() < 0.15:
            raise ConnectionError(f"{verb}: gone")

    stores.fail = fail
    outer = stores.begin()
    outer.log_settings({}, {})
    for number in range(8):
        do_trial(outer, f"t{number}")
    outer.close("finished")
    assert outer.uploader.is_done
    for number in range(8):
        check_delivered(stores, f"t{number}")


def test_a_store_that_is_down_blocks_no_trial_and_the_next_attempt_delivers(
    stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_verb: str) -> None:
        raise ConnectionError

    stores.fail = refuse
    outer = stores.begin(patience=0.0)
    do_trial(outer, "a")
    do_trial(outer, "b")
    outer.close("saved-and-left")
    assert f"tracking: 6 rows of {stores.run}" in caplog.text
    thread = outer.uploader._thread
    assert thread is not None
    thread.join(WAIT)
    stores.fail = lambda _: None
    outer = stores.begin()
    do_trial(outer, "c")
    outer.close("finished")
    for name in ("a", "b", "c"):
        check_delivered(stores, name)


def test_what_is_delivered_is_left_alone_by_later_attempts_and_compared_by_hand(stores: Stores) -> None:
    outer = stores.begin()
    do_trial(outer, "a")
    left = begin_trial(outer, "left")
    left.log_rows([row(1)])
    left.close("saved-and-left")
    outer.close("saved-and-left")
    stores.connections.clear()
    outer = stores.begin()
    do_trial(outer, "left", 2)
    outer.close("finished")
    assert set(stores.connections) == {"run", "left"}
    check_delivered(stores, "left")
    stores.connections.clear()
    by_hand = stores.sync_by_hand()
    by_hand.upload_rows_and_tags()
    by_hand.upload_files(final=True)
    by_hand.close()
    assert sorted(stores.connections) == ["a", "left", "run"]
    check_delivered(stores, "a")


def test_a_store_that_lost_all_gets_all(stores: Stores) -> None:
    outer = stores.begin()
    do_trial(outer, "a")
    outer.close("saved-and-left")
    stores.by_name.clear()
    write_json(stores.run / "mlflow.json", {"run_id": "another"})
    outer = stores.begin()
    outer.log_settings({}, {})
    outer.close("finished")
    check_delivered(stores, "a")


def test_a_damaged_trial_is_one_warning_and_the_others_arrive(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("bad", "worse"):
        (stores.run / "trials" / name).mkdir(parents=True)
        (stores.run / "trials" / name / "metrics.jsonl").write_text("{\n")
    (stores.run / "trials" / "worse" / "metrics.jsonl").write_text(json.dumps(row(1) | {"time": 1.0}) + "\n")
    (stores.run / "trials" / "worse" / "settings.json").write_text("[")
    (stores.run / "folds").mkdir()
    (stores.run / "folds" / "a file").write_text("")
    outer = stores.begin()
    do_trial(outer, "good")
    outer.close("finished")
    check_delivered(stores, "good")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("is not delivered: " in warning for warning in warnings)


def test_a_trial_that_another_attempt_takes_over(stores: Stores) -> None:
    outer = stores.begin()
    outer.log_settings({}, {})
    first = begin_trial(outer, "a")
    first.log_rows([row(1)])
    until(lambda: steps(stores, "a") == {1})
    other = JsonlTracker(stores.run / "trials" / "a", 1)  # of another process
    other.log_rows([row(2)])
    first.log_rows([row(7)])
    first.rewind(1)
    first.close("superseded")
    other.close("saved-and-left")
    outer.close("superseded")
    assert steps(stores, "a") == {1, 2}


def test_the_outer_run_taken_over_delivers_nothing_more(stores: Stores) -> None:
    outer = stores.begin()
    outer.log_settings({}, {})
    until(lambda: "run" in stores.connections)
    later = JsonlTracker(stores.run, 0)
    stores.opened.append(later)
    with pytest.raises(MetricsFileReplaced):
        outer.sync.upload_rows_and_tags()
    outer.close("superseded")


def test_who_delivers_a_nested_run(tmp_path: Path) -> None:
    """Without MLflow, and for a fold of an array, which no run contains, nobody does here."""
    cfg = TrackingConfig(uri=None)
    outer, _ = open_tracker(tmp_path, cfg, None, 0)
    inner, _ = open_tracker(tmp_path / "trials" / "a", cfg, None, 0, outer_tracker=outer)
    assert isinstance(inner, JsonlTracker)
    inner.close("finished")
    outer.close("finished")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own dependencies have moved on
def test_in_mlflow_trials_are_children_and_leave_the_outer_runs_state_alone(tmp_path: Path) -> None:
    """A trial and the outer run are both under way; the trial ends, and the outer run is under way still."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    outer, _ = open_tracker(tmp_path / "run", TrackingConfig(uri=uri), None, 0)
    outer.log_settings({}, {})
    (tmp_path / "run" / "science.json").write_text("{}")  # a run has one, a pipeline has none
    folder = tmp_path / "run" / "trials" / "<b>ä"
    trial, _ = open_tracker(folder, TrackingConfig(uri=None), None, 0, outer_tracker=outer)
    trial.log_settings({"seed": 1}, {})
    trial.log_rows([row(1)])
    write_json(folder / "finished.json", {})
    trial.close("finished")
    note = tmp_path / "run" / nested._DELIVERED
    until(note.exists)
    client = MlflowClient(uri)
    outer_id, trial_id = run_id(tmp_path / "run"), run_id(folder)
    found = client.get_run(trial_id)
    assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("FINISHED", outer_id)
    assert in_mlflow(client, folder) == in_jsonl(folder)
    assert client.get_run(outer_id).info.status == "RUNNING"
    outer.close("failed")
    assert client.get_run(outer_id).info.status == "FAILED"
    assert client.get_run(trial_id).info.status == "FINISHED"


def test_a_trial_alone_is_not_synced(tmp_path: Path) -> None:
    """`foveal track sync` of a trial names the run that it is a part of."""
    trial = tmp_path / "run" / "trials" / "a"
    trial.mkdir(parents=True)
    for folder in (trial, tmp_path / "run"):
        (folder / "config.yaml").write_text("tracking: {uri: null}\n")
    (trial / "metrics.jsonl").write_text("")
    outer = tmp_path / "run"
    with pytest.raises(ConfigError, match=f"{trial} is a part of {outer}, .*: foveal track sync {outer}$"):
        sync(trial)
    with pytest.raises(ConfigError, match=f"{outer}/config.yaml: tracking.uri is null"):
        sync(outer)
