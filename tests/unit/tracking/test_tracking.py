"""Every tracker keeps the same promises: each number once, resumed or not, gone back or not."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from points import Numbers, in_jsonl, in_mlflow, row, run_id

from foveal.errors import AttemptSupersededError
from foveal.tracking import open_tracker
from foveal.tracking.jsonl import JsonlTracker, read_rows_without_time
from foveal.tracking.mlflow import MLflowRun, prepare_store_and_artifacts
from foveal.tracking.tracker import AttemptState, NullTracker, Tracker, TrackingConfig
from foveal.tracking.uploader import UploadingTracker

# MLflow's own dependencies have moved on; foveal's command line does not show these either.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/deep/mlflow.db"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    Path(uri.removeprefix("sqlite:///")).parent.mkdir(exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@dataclass
class Kind:
    """A kind of tracker: how it is opened for a run that resumes from a step, and what it has kept."""

    opened: Callable[[int], Tracker]
    numbers: Callable[[], Numbers]


@pytest.fixture(params=["jsonl", "mlflow"])
def kind(request: pytest.FixtureRequest, uri: str, client: MlflowClient, tmp_path: Path) -> Kind:
    run = tmp_path / "run"
    if request.param == "jsonl":
        return Kind(lambda start: JsonlTracker(run, start), lambda: in_jsonl(run))
    cfg = TrackingConfig(uri=uri)
    return Kind(lambda start: open_tracker(run, cfg, None, start)[0], lambda: in_mlflow(client, run))


_CHANGED = ["optim.lr", "data.mean", "model"]


def use(tracker: Tracker, first: int, last: int, state: AttemptState = "finished") -> None:
    """An attempt, from the first step to the last."""
    tracker.log_settings({"optim.lr": 0.1, "model": None, "data.mean": [0.5]}, {"ranks": "2"}, _CHANGED)
    for step in range(first, last, 2):
        tracker.log_rows([row(step), row(step + 1)] if step < last else [row(step)])
    tracker.log_rows([])
    tracker.log_results_once({"val_top1": 0.5}, last)
    tracker.close(state)


def expected(last: int, *results: int) -> Numbers:
    numbers: Numbers = {}
    for step in range(1, last + 1):
        numbers |= {("train/loss", step): [1 / step], ("update/lr", step): [step / 100]}
    return numbers | {("val/top1", step): [0.5] for step in results}


def test_every_number_is_kept_once(kind: Kind) -> None:
    use(kind.opened(0), 1, 6)
    assert kind.numbers() == expected(6, 6)


def test_a_resumed_attempt_goes_on_and_counts_nothing_twice(kind: Kind) -> None:
    """Killed after step 6 with the newest checkpoint at 4: steps 5 and 6 are trained again."""
    use(kind.opened(0), 1, 6, "failed")
    use(kind.opened(4), 5, 10)
    found = kind.numbers()
    assert all(len(values) == 1 for values in found.values()), found
    assert {place for place in found if place[0] == "train/loss"} == {("train/loss", step) for step in range(1, 11)}
    assert found[("val/top1", 10)] == [0.5]


def test_an_attempt_that_had_nothing_left_to_do_adds_nothing(kind: Kind) -> None:
    use(kind.opened(0), 1, 6)
    again = kind.opened(6)
    again.log_settings({"optim.lr": 0.1}, {})
    again.close("finished")
    assert kind.numbers() == expected(6, 6)


def test_what_is_not_finite_is_kept_too(kind: Kind) -> None:
    tracker = kind.opened(0)
    tracker.log_rows([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 0.5}])
    tracker.log_rows([{"step": 4, "loss": float("-inf")}])
    tracker.close("diverged")
    found = kind.numbers()
    assert math.isnan(found[("train/loss", 1)][0])
    assert found[("train/loss", 2)][0] > 1e300
    assert found[("train/loss", 3)] == [0.5]
    assert found[("train/loss", 4)][0] < -1e300
    kind.opened(4).close("finished")
    assert kind.numbers().keys() == found.keys()


def test_an_attempt_that_was_superseded_while_it_loaded_leaves_the_rows_alone(tmp_path: Path) -> None:
    """It asks last, when all is ready to take the file."""
    newer = JsonlTracker(tmp_path, 0, attempt_number=2)
    newer.log_rows([{"step": 1, "loss": 0.5}])

    def superseded() -> None:
        assert list(tmp_path.glob(".metrics.jsonl.1.draft")), "it was ready"
        raise AttemptSupersededError("another attempt has taken over")

    with pytest.raises(AttemptSupersededError):
        JsonlTracker(tmp_path, 0, attempt_number=1, check_lease=superseded)
    newer.log_rows([{"step": 2, "loss": 0.25}])
    newer.close("finished")
    assert [row["loss"] for row in read_rows_without_time(tmp_path / "metrics.jsonl")] == [0.5, 0.25]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_every_tracker_has_every_verb() -> None:
    verbs = {name for name in vars(Tracker) if not name.startswith("_")}
    assert verbs == {"log_settings", "log_rows", "log_results_once", "log_file", "rewind", "skip_flush", "close"}
    for each in (NullTracker, UploadingTracker, JsonlTracker):
        assert verbs <= vars(each).keys(), each
    use(NullTracker(), 1, 4)
    NullTracker().rewind(2)


def test_stages_are_children_of_their_pipeline(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    pipeline, cfg = tmp_path / "pipeline", TrackingConfig(uri=uri, experiment="pipelines")
    for stage in ("pretrain", "distill"):
        use(open_tracker(pipeline / stage, cfg, str(pipeline), 0)[0], 1, 4)
    parent = client.get_run(run_id(pipeline))
    children = [client.get_run(run_id(pipeline / stage)) for stage in ("pretrain", "distill")]
    assert [child.data.tags[MLFLOW_PARENT_RUN_ID] for child in children] == [parent.info.run_id] * 2
    assert [child.info.run_name for child in children] == ["pipeline/pretrain", "pipeline/distill"]
    assert (parent.info.run_name, parent.info.status) == ("pipeline", "FINISHED")
    assert MLFLOW_PARENT_RUN_ID not in parent.data.tags
    experiment = client.get_experiment_by_name("pipelines")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 3


@pytest.mark.parametrize("stale", [False, True])
def test_stages_that_begin_at_once_have_one_parent(
    uri: str, client: MlflowClient, tmp_path: Path, *, stale: bool
) -> None:
    pipeline, cfg = tmp_path / "pipeline", TrackingConfig(uri=uri, experiment=f"at once {stale}")
    pipeline.mkdir()
    client.create_experiment(cfg.experiment)
    if stale:
        (pipeline / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32, "store": uri}))
    stages, together = ("a", "b", "c"), threading.Barrier(3)

    def begin(stage: str) -> None:
        together.wait()
        MLflowRun(cfg, pipeline / stage, pipeline, stage)

    threads = [threading.Thread(target=begin, args=(stage,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parent = run_id(pipeline)
    assert [client.get_run(run_id(pipeline / stage)).data.tags[MLFLOW_PARENT_RUN_ID] for stage in stages] == [
        parent
    ] * 3
    experiment = client.get_experiment_by_name(cfg.experiment)
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 4
    assert sorted(each.name for each in pipeline.glob("[!.]*")) == ["a", "b", "c", "mlflow.json"]


def test_a_resumed_attempt_is_the_same_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run, cfg = tmp_path / "run", TrackingConfig(uri=uri, experiment="resumed")
    use(open_tracker(run, cfg, None, 0)[0], 1, 4, "saved-and-left")
    first = client.get_run(run_id(run))
    assert first.info.status == "SCHEDULED"
    assert first.data.params == {"optim.lr": "0.1", "model": "None", "data.mean": "[0.5]"}
    assert (first.data.tags["ranks"], first.data.tags["state"]) == ("2", "saved-and-left")
    store = MLflowRun(cfg, run, None, "")
    store.set_params_tags_status(
        {"optim.lr": 0.1, "log.every": 3, "data.mean": [0.7]}, {"ranks": "4", "state": "running"}, ["log.every"]
    )
    second = client.get_run(run_id(run))
    assert second.info.run_id == first.info.run_id
    assert second.info.status == "RUNNING"
    assert second.data.params == first.data.params | {"log.every": "3"}
    assert second.data.tags["changed.data.mean"] == "[0.7]"
    assert second.data.tags["ranks"] == "4"
    assert not [name for name in second.data.tags if name.startswith("changed.optim")]
    store.set_params_tags_status({"data.mean": [0.5]}, {"state": "failed", "why_stopped": "a lost rank"})
    third = client.get_run(run_id(run))
    assert third.data.tags["changed.data.mean"] == "[0.5]"
    assert (third.info.status, third.data.tags["why_stopped"]) == ("FAILED", "a lost rank")


def test_params_that_a_lost_request_logs_at_the_same_time(
    uri: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cfg = tmp_path / "run", TrackingConfig(uri=uri, experiment="twice")
    use(open_tracker(run, cfg, None, 0)[0], 1, 2, "saved-and-left")
    store, log_batch, arrives = MLflowRun(cfg, run, None, ""), MlflowClient.log_batch, True

    def refuse(self: MlflowClient, run_id: str, **batch: Any) -> None:
        if arrives:
            log_batch(self, run_id, **batch)
        if batch.get("params"):
            raise MlflowException("UNIQUE constraint failed: params.key")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    store.set_params_tags_status({"epochs": 3}, {"state": "running"})
    assert client.get_run(run_id(run)).data.params["epochs"] == "3"
    arrives = False
    with pytest.raises(MlflowException, match="UNIQUE"):
        store.set_params_tags_status({"seed": 1}, {"state": "running"})


def test_more_settings_and_rows_than_one_request_takes(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, TrackingConfig(uri=uri), None, 0)
    settings = {f"setting.{number}": "x" * 7000 if number == 3 else number for number in range(205)}
    tracker.log_settings(settings, {}, list(settings))
    tracker.log_rows([{"step": step, "loss": float(step), "lr": 0.5, "norm": 1.0} for step in range(1, 701)])
    tracker.log_results_once({"an arm+its+top1": 0.5}, 700)
    tracker.close("finished")
    assert client.get_run(run_id(run)).data.params.keys() == set(list(settings)[:40])
    MLflowRun(TrackingConfig(uri=uri), run, None, "").set_params_tags_status(settings, {"state": "finished"})
    assert len(client.get_run(run_id(run)).data.params) == 205
    assert in_mlflow(client, run) == {("an arm_its_top1", 700): [0.5]} | {
        place: [value]
        for step in range(1, 701)
        for place, value in (
            (("train/loss", step), float(step)),
            (("update/lr", step), 0.5),
            (("train/norm", step), 1.0),
        )
    }


def test_files_lie_beside_the_store(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """Those that an attempt names, and at the next those that were left."""
    run, cfg = tmp_path / "run", TrackingConfig(uri=uri)
    tracker, _ = open_tracker(run, cfg, None, 0)
    for name, data in {"pictures/a.png": b"a", "pictures/b.png": b"b", "config.yaml": b"seed: 1"}.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(data)
    tracker.log_settings({}, {})
    tracker.log_file(run / "pictures" / "a.png")
    tracker.close("saved-and-left")
    kept = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id(run) / "artifacts"
    assert {each.name for each in kept.rglob("*.*")} == {"a.png", "b.png", "config.yaml", "settings.json"}
    sent = (kept / "pictures" / "a.png").stat().st_mtime_ns
    (run / "config.yaml").write_text("seed: 2")
    (run / "pictures" / "c.png").write_bytes(b"c")
    (run / "rollbacks.jsonl").write_text('{"time": 1.0, "to": 0}\n')
    open_tracker(run, cfg, None, 0)[0].close("finished")
    assert (kept / "config.yaml").read_text() == "seed: 2"
    assert (kept / "pictures" / "a.png").stat().st_mtime_ns == sent
    assert (kept / "pictures" / "c.png").read_bytes() == b"c"
    assert (kept / "rollbacks.jsonl").exists()


def test_a_relative_store_lies_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_store_and_artifacts("sqlite:///runs/mlflow.db") == (
        f"sqlite:///{tmp_path}/runs/mlflow.db",
        f"file://{tmp_path}/runs/mlartifacts",
    )
    assert prepare_store_and_artifacts("https://mlflow.example.org") == ("https://mlflow.example.org", None)
