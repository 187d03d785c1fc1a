"""Data sets, models and versions through a real MLflow server: once each, although answers get lost, or are no."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_facts import write_export, write_run_inputs
from mlflow.entities import LoggedModelStatus
from mlflow.tracking import MlflowClient
from mlflow_server import Server, Spoiler
from points import in_jsonl, in_mlflow, row, run_id

from foveal.atomic import write_json
from foveal.tracking import open_tracker, uploader
from foveal.tracking.tracker import TrackingConfig

pytestmark = [
    pytest.mark.slow,  # MLflow's server takes ten seconds to start
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
_REQUESTS = ("log-inputs", "logged-models", "outputs", "registered-models", "model-versions", "mlflow-artifacts")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.answers()
    yield server
    server.kill()


@pytest.fixture
def spoiler(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Spoiler]:
    for name, seconds in {"_ROUND_SECONDS": 0.05, "_MIN_WAIT": 0.2, "_MAX_WAIT": 1.0}.items():
        monkeypatch.setattr(uploader, name, seconds)
    caplog.set_level(logging.WARNING, "foveal")
    spoiler = Spoiler(server.port)
    yield spoiler
    spoiler.close()


def attempt(run: Path, uri: str, name: str) -> None:
    """A run of four steps that leaves an export, which is uploaded and registered."""
    cfg = TrackingConfig(
        uri=uri, experiment="facts", flush_timeout_seconds=120, register=name, alias="best", upload_models=True
    )
    write_run_inputs(run)
    tracker, _ = open_tracker(run, cfg, str(run.parent), 0)
    tracker.log_settings({"epochs": 3}, {"ranks": "1"})
    tracker.log_rows([row(step) for step in range(1, 5)])
    tracker.log_results_once({"val_top1": 0.5}, 4)
    write_export(run, val_top1=0.5, loss=0.25)
    write_json(run / "finished.json", {"summary": {"val_top1": 0.5}})
    tracker.close("finished")


def test_answers_that_get_lost(server: Server, spoiler: Spoiler, tmp_path: Path, caplog) -> None:
    """Each request is carried out and its answer cut off, at several places of its kind."""
    run, client = tmp_path / "pipeline" / "run", MlflowClient(server.uri)
    for about in _REQUESTS:
        spoiler.inject("cut", about=about, after=0)
        spoiler.inject("cut", about=about, skip=2, after=0)
    attempt(run, spoiler.uri, "lost")
    spoiler.heal()
    attempt(run, spoiler.uri, "lost")
    assert in_mlflow(client, run) == in_jsonl(run)
    found = client.get_run(run_id(run))
    assert found.inputs and found.outputs
    assert sorted(entry.dataset.name for entry in found.inputs.dataset_inputs) == ["digits train", "digits val"]
    (output,) = found.outputs.model_outputs
    models = client.search_logged_models([found.info.experiment_id], f"source_run_id = '{found.info.run_id}'")
    assert [(model.model_id, model.status) for model in models] == [(output.model_id, LoggedModelStatus.READY)]
    files = {file.path for file in client.list_logged_model_artifacts(output.model_id)}
    assert files == {"card.json", "README.md", "model.safetensors"}
    (version,) = client.search_model_versions("name = 'lost'")
    assert client.get_model_version_by_alias("lost", "best").version == version.version
    assert client.get_run(run_id(run.parent)).info.status == "FINISHED"


def test_an_older_server_gets_what_it_knows(server: Server, spoiler: Spoiler, tmp_path: Path, caplog) -> None:
    run, client = tmp_path / "pipeline" / "run", MlflowClient(server.uri)
    spoiler.inject("404", about="logged-models", times=10**6)
    attempt(run, spoiler.uri, "older")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("foveal")]
    assert line.startswith(f"tracking: MLflow at {spoiler.uri} takes no models: ")
    assert in_mlflow(client, run) == in_jsonl(run)
    found = client.get_run(run_id(run))
    assert found.inputs and len(found.inputs.dataset_inputs) == 2
    assert found.data.tags["state"] == "finished"
    spoiler.heal()
    attempt(run, spoiler.uri, "older")  # the server is a new one since
    assert len(client.search_model_versions("name = 'older'")) == 1
