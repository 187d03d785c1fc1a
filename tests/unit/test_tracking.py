"""Every tracker keeps the same promises: each number once, resumed or not, and no store is worth a run."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from foveal.runtime import connected
from foveal.tracking.jsonl import Jsonl, read_rows
from foveal.tracking.mlflow import MLflow, _store
from foveal.tracking.tracker import Both, Row, Silent, Status, Tracker, TrackingConfig

# MLflow's own dependencies have moved on; foveal's command line does not show these either.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Numbers = dict[tuple[str, int], list[float]]  # (name, step) to every value that was written for it


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


def run_id(run: Path) -> str:
    return json.loads((run / "mlflow.json").read_text())["run_id"]


def in_jsonl(run: Path) -> Numbers:
    found: Numbers = {}
    for row in read_rows(run / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                found.setdefault((name, int(row["step"])), []).append(value)
    return found


def in_mlflow(client: MlflowClient, run: Path) -> Numbers:
    found: Numbers = {}
    for name in client.get_run(run_id(run)).data.metrics:
        for metric in client.get_metric_history(run_id(run), name):
            found.setdefault((name, metric.step), []).append(metric.value)
    return found


@pytest.fixture(params=["jsonl", "mlflow", "both"])
def kind(request: pytest.FixtureRequest, uri: str, client: MlflowClient, tmp_path: Path) -> Kind:
    run = tmp_path / "run"
    run.mkdir()
    cfg = TrackingConfig(uri=uri)

    def jsonl(start: int) -> Tracker:
        return Jsonl(run / "metrics.jsonl", start)

    def mlflow(start: int) -> Tracker:
        return MLflow(cfg, run, None)

    kinds = {
        "jsonl": Kind(jsonl, lambda: in_jsonl(run)),
        "mlflow": Kind(mlflow, lambda: in_mlflow(client, run)),
        "both": Kind(lambda start: Both(jsonl(start), mlflow(start)), lambda: in_mlflow(client, run) | in_jsonl(run)),
    }
    return kinds[request.param]


def row(step: int) -> Row:
    return {"step": step, "loss": 1 / step, "lr": step / 100}


def use(tracker: Tracker, first: int, last: int, status: Status = "FINISHED") -> None:
    """An attempt, from the first step to the last."""
    tracker.settings({"optim.lr": 0.1, "model": None, "data.mean": [0.5]}, {"ranks": "2"})
    for step in range(first, last, 2):
        tracker.rows([row(step), row(step + 1)] if step < last else [row(step)])
    tracker.rows([])
    tracker.results({"val_top1": 0.5}, last)
    tracker.close(status)


def expected(last: int, *results: int) -> Numbers:
    numbers: Numbers = {}
    for step in range(1, last + 1):
        numbers |= {("loss", step): [1 / step], ("lr", step): [step / 100]}
    return numbers | {("val_top1", step): [0.5] for step in results}


def test_every_number_is_kept_once(kind: Kind) -> None:
    use(kind.opened(0), 1, 6)
    assert kind.numbers() == expected(6, 6)


def test_a_resumed_attempt_goes_on_and_counts_nothing_twice(kind: Kind) -> None:
    """Killed after step 6 with the newest checkpoint at 4: steps 5 and 6 are trained again."""
    use(kind.opened(0), 1, 6, "FAILED")
    use(kind.opened(4), 5, 10)
    found = kind.numbers()
    assert all(len(values) == 1 for values in found.values()), found
    assert {place for place in found if place[0] == "loss"} == {("loss", step) for step in range(1, 11)}
    assert found[("val_top1", 10)] == [0.5]


def test_an_attempt_that_had_nothing_left_to_do_adds_nothing(kind: Kind) -> None:
    use(kind.opened(0), 1, 6)
    again = kind.opened(6)
    again.settings({"optim.lr": 0.1}, {})
    again.close("FINISHED")
    assert kind.numbers() == expected(6, 6)


def test_what_is_not_finite_is_kept_too(kind: Kind) -> None:
    tracker = kind.opened(0)
    tracker.rows([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 0.5}])
    tracker.close("FAILED")
    found = kind.numbers()
    assert math.isnan(found[("loss", 1)][0])
    assert found[("loss", 2)][0] > 1e300
    assert found[("loss", 3)] == [0.5]
    kind.opened(3).close("FINISHED")
    assert kind.numbers().keys() == found.keys()


def test_every_tracker_has_every_verb() -> None:
    verbs = {name for name in vars(Tracker) if not name.startswith("_")}
    assert verbs == {"settings", "rows", "results", "file", "close"}
    for each in (Silent, Both, Jsonl, MLflow):
        assert verbs <= vars(each).keys(), each
    use(Silent(), 1, 4)


# metrics.jsonl


def test_jsonl_drops_what_came_after_the_checkpoint_and_keeps_the_rest_to_the_letter(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    use(Jsonl(file, 0), 1, 6)
    lines = file.read_text().splitlines()
    Jsonl(file, 4).close("KILLED")
    assert file.read_text().splitlines() == lines[:4]
    Jsonl(file, 0).close("KILLED")
    assert file.read_text() == ""
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_forgets_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    use(Jsonl(file, 0), 1, 6)
    whole = file.read_text()
    for end in (len(whole) - 1, len(whole) - 5, whole.index("\n", 30) + 1, whole.index("\n", 30), 3):
        file.write_text(whole[:end])
        assert [json.dumps(found) for found in read_rows(file)] == whole[:end].split("\n")[:-1]
    file.write_text(whole[:-9])
    tracker = Jsonl(file, 6)
    tracker.rows([row(7)])
    tracker.close("FINISHED")
    assert [found["step"] for found in read_rows(file)] == [1, 2, 3, 4, 5, 6, 7]


def test_jsonl_is_on_disk_after_every_delivery(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl", 0)
    tracker.rows([row(1)])
    assert read_rows(tmp_path / "metrics.jsonl") == [row(1)]
    tracker.close("FINISHED")


# MLflow


def test_stages_are_children_of_their_pipeline(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    pipeline, cfg = tmp_path / "pipeline", TrackingConfig(uri=uri, experiment="pipelines")
    for stage in ("pretrain", "distill"):
        use(MLflow(cfg, pipeline / stage, pipeline), 1, 4)
    parent = client.get_run(run_id(pipeline))
    children = [client.get_run(run_id(pipeline / stage)) for stage in ("pretrain", "distill")]
    assert [child.data.tags[MLFLOW_PARENT_RUN_ID] for child in children] == [parent.info.run_id] * 2
    assert [child.info.run_name for child in children] == ["pretrain", "distill"]
    assert (parent.info.run_name, parent.info.status) == ("pipeline", "FINISHED")
    assert MLFLOW_PARENT_RUN_ID not in parent.data.tags
    experiment = client.get_experiment_by_name("pipelines")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 3


def test_a_resumed_attempt_is_the_same_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run, cfg = tmp_path / "run", TrackingConfig(uri=uri, experiment="resumed")
    use(MLflow(cfg, run, None), 1, 4, "KILLED")
    first = client.get_run(run_id(run))
    assert first.info.status == "KILLED"
    assert first.data.params == {"optim.lr": "0.1", "model": "None", "data.mean": "[0.5]"}
    assert first.data.tags["ranks"] == "2"
    tracker = MLflow(cfg, run, None)
    assert client.get_run(run_id(run)).info.status == "RUNNING"
    tracker.settings({"optim.lr": 0.1, "log.every": 3, "data.mean": [0.7]}, {"ranks": "4"})
    tracker.close("FINISHED")
    second = client.get_run(run_id(run))
    assert second.info.run_id == first.info.run_id
    assert second.info.status == "FINISHED"
    assert second.data.params == first.data.params | {"log.every": "3"}
    assert second.data.tags["changed.data.mean"] == "[0.7]"
    assert second.data.tags["ranks"] == "4"
    assert not [name for name in second.data.tags if name.startswith("changed.optim")]


def test_more_settings_and_rows_than_one_request_takes(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracker = MLflow(TrackingConfig(uri=uri), run, None)
    tracker.settings({f"setting.{number}": number for number in range(205)}, {})
    tracker.rows([{"step": step, "loss": float(step), "lr": 0.5, "norm": 1.0} for step in range(1, 701)])
    assert len(client.get_run(run_id(run)).data.params) == 205
    assert in_mlflow(client, run) == {
        place: [value]
        for step in range(1, 701)
        for place, value in ((("loss", step), float(step)), (("lr", step), 0.5), (("norm", step), 1.0))
    }


def test_files_lie_beside_the_store(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracker = MLflow(TrackingConfig(uri=uri), run, None)
    (run / "pictures").mkdir()
    (run / "pictures" / "sheet.png").write_bytes(b"a picture")
    (run / "config.yaml").write_text("seed: 1")
    tracker.file(run / "pictures" / "sheet.png")
    tracker.file(run / "config.yaml")
    assert sorted(each.path for each in client.list_artifacts(run_id(run))) == ["config.yaml", "pictures"]
    kept = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id(run) / "artifacts"
    assert (kept / "pictures" / "sheet.png").read_bytes() == b"a picture"


def test_a_relative_store_lies_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _store("sqlite:///runs/mlflow.db") == (
        f"sqlite:///{tmp_path}/runs/mlflow.db",
        f"file://{tmp_path}/runs/mlartifacts",
    )
    assert _store("https://mlflow.example.org") == ("https://mlflow.example.org", None)


# A store that cannot be reached


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db", "nonsense://x"])
def test_a_store_that_is_not_there_is_a_warning(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With MLflow's own patience the first of these would hold every rank for four minutes."""
    assert connected(TrackingConfig(uri=where), tmp_path / "run", None) is None
    warnings = [record.getMessage() for record in caplog.records if record.name == "foveal.runtime"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"tracking: no MLflow at {where} (")
    assert warnings[0].endswith("; metrics.jsonl has every number")


def test_without_a_store_nobody_asks(tmp_path: Path) -> None:
    assert connected(TrackingConfig(uri=None), tmp_path, None) is None


class Broken(Silent):
    """A store that went away after the run began."""

    def __getattribute__(self, verb: str) -> Any:
        def fails(*_: Any) -> None:
            raise ConnectionError(f"{verb}: gone")

        return fails


def test_a_store_that_goes_away_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Both(Jsonl(tmp_path / "metrics.jsonl", 0), Broken())
    use(tracker, 1, 4)
    assert in_jsonl(tmp_path) == expected(4, 4)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said[0] == (
        "tracking: settings was not delivered (ConnectionError: settings: gone); metrics.jsonl has every number"
    )
    assert len(said) == 6


def test_a_full_disk_under_metrics_jsonl_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        Both(Broken(), Silent()).rows([row(1)])
