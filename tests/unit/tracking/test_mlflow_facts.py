"""What a real store of MLflow has of runs: data sets, models, versions, tags, pipelines; each once."""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_facts import write_export, write_run_inputs
from mlflow.entities import LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import FEATURE_DISABLED
from mlflow.tracking import MlflowClient
from points import row, run_id

from foveal.atomic import write_json
from foveal.runs.inputs import ModelInput
from foveal.tracking import open_tracker
from foveal.tracking.mlflow import MLflowRun
from foveal.tracking.sync_facts import FactsSync
from foveal.tracking.tracker import AttemptState, TrackingConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    MLflowRun(TrackingConfig(uri=uri), Path(uri.removeprefix("sqlite:///")).parent / "first", None, "first")
    return uri


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def attempt(
    run: Path, uri: str, state: AttemptState = "finished", *models: ModelInput, tags: Any = None, **tracking: Any
) -> None:
    """An attempt of four steps; a finished one leaves an export with its results."""
    cfg = TrackingConfig.from_dict({"uri": uri, "experiment": "facts", **tracking}, "test")
    write_run_inputs(run, *models)
    tracker, _ = open_tracker(run, cfg, str(run.parent), 0)
    tracker.log_settings({"epochs": 3, "seed": 1, "log.every": 5}, tags or {"ranks": "1"}, ["data.lanes"])
    tracker.log_rows([row(step) for step in range(1, 5)])
    tracker.log_results_once({"val_top1": 0.5, "holdout_top1": 0.25}, 4)
    if state == "finished":
        write_export(run, val_top1=0.5, holdout_top1=0.25, loss=0.25, sha256=run.name.ljust(64, "0"))
        write_json(run / "finished.json", {"summary": {"val_top1": 0.5, "holdout_top1": 0.25}})
    tracker.close(state, "Slurm asked" if state == "saved-and-left" else state)


def stored(client: MlflowClient, run: Path) -> Run:
    return client.get_run(run_id(run))


def test_data_sets_models_and_their_chain(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    pretrain, distill = tmp_path / "pipeline" / "pretrain", tmp_path / "pipeline" / "distill"
    attempt(pretrain, uri)
    teacher = ModelInput("teacher", str(pretrain / "export"), "pretrain".ljust(64, "0"), "pretrain", 4)
    foreign = ModelInput("init", "/weights.pth", "f" * 64, "foreign", 0)
    for _ in range(2):  # the second attempt has nothing left to send
        attempt(distill, uri, "finished", teacher, foreign)
    first, second = stored(client, pretrain), stored(client, distill)
    assert first.inputs and first.outputs and second.inputs and second.outputs
    data = {entry.dataset.name: entry for entry in second.inputs.dataset_inputs}
    assert data.keys() == {"digits train", "digits val"}
    assert json.loads(data["digits train"].dataset.profile or "")["num_images"] == 1437
    assert {tag.key: tag.value for tag in data["digits val"].tags}["mlflow.data.context"] == "evaluation"
    (output,) = first.outputs.model_outputs
    assert [entry.model_id for entry in second.inputs.model_inputs or ()] == [output.model_id]
    assert second.data.tags["input.init.sha256"] == "f" * 64
    assert "input.teacher.path" not in second.data.tags
    models = client.search_logged_models([first.info.experiment_id], f"source_run_id = '{second.info.run_id}'")
    (model,) = models
    assert (model.name, model.status, output.step) == ("pipeline-distill", LoggedModelStatus.READY, 4)
    assert {file.path for file in client.list_logged_model_artifacts(model.model_id)} == {"card.json", "README.md"}
    assert {(metric.key, metric.value, metric.dataset_name) for metric in model.metrics or ()} == {
        ("val/top1", 0.5, "digits val"),
        ("val/holdout/top1", 0.25, None),
        ("train/loss", 0.25, None),
    }
    for name in second.data.metrics:
        steps = [point.step for point in client.get_metric_history(second.info.run_id, name)]
        assert len(steps) == len(set(steps)), f"{name}: the model's metrics are the run's"


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_twin(uri: str, client: MlflowClient, tmp_path: Path, monkeypatch, *, is_lost: bool) -> None:
    """The answer to a request got lost: what it made is found. Another process makes a model at once: the oldest stays."""
    run, create, made = tmp_path / "p" / "run", MlflowClient.create_logged_model, []

    def twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        made.append(create(self, *args, **kwargs).model_id)
        if is_lost:
            raise ConnectionError("gone")
        return create(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_logged_model", twice)
    attempt(run, uri)
    attempt(run, uri)
    mine = stored(client, run)
    models = client.search_logged_models([mine.info.experiment_id], f"source_run_id = '{mine.info.run_id}'")
    assert [(model.status, model.model_id) for model in models] == [(LoggedModelStatus.READY, made[0])]
    assert mine.outputs and [output.model_id for output in mine.outputs.model_outputs] == made


def test_an_upload_of_weights_has_time(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr(
        MlflowClient, "log_model_artifacts", lambda *_: seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    )
    attempt(tmp_path / "p" / "run", uri, upload_models=True)
    assert (seen, os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == (["600"], "10")


def test_versions_of_a_registered_model(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run, other = tmp_path / "p" / "one", tmp_path / "p" / "two"
    for folder in (run, run, other, run):  # the last one is an older run that is delivered later
        attempt(folder, uri, register="digits", alias="champion", upload_models=True)
    versions = sorted(client.search_model_versions("name = 'digits'"), key=lambda version: int(version.version))
    assert [version.tags["sha256"] for version in versions] == ["one".ljust(64, "0"), "two".ljust(64, "0")]
    assert versions[0].description == "# An encoder"
    best = client.get_model_version_by_alias("digits", "champion")
    assert (best.version, best.run_id) == (versions[1].version, run_id(other))
    outputs = stored(client, other).outputs
    assert outputs
    files = {file.path for file in client.list_logged_model_artifacts(outputs.model_outputs[0].model_id)}
    assert files == {"card.json", "README.md", "model.safetensors"}


def test_a_head_on_the_same_encoder_is_a_version_of_its_own(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """A frozen encoder has one file under two heads. A version that an older foveal made has no tag of the head."""
    frozen = "f" * 64
    for folder, head in (("a", "1" * 64), ("b", "2" * 64), ("a", "1" * 64)):
        run = tmp_path / "p" / folder
        attempt(run, uri)
        write_export(run, frozen, head_sha256=head)
        register(run, uri, "heads")
    assert len(client.search_model_versions("name = 'heads'")) == 2
    attempt(tmp_path / "p" / "c", uri, register="old")
    (old,) = client.search_model_versions("name = 'old'")
    client.delete_model_version_tag("old", old.version, "foveal.identity")
    attempt(tmp_path / "p" / "c", uri, register="old")
    assert len(client.search_model_versions("name = 'old'")) == 1
    write_export(tmp_path / "p" / "c", "c".ljust(64, "0"), head_sha256="1" * 64)
    register(tmp_path / "p" / "c", uri, "old")
    assert len(client.search_model_versions("name = 'old'")) == 2


def register(run: Path, uri: str, name: str) -> None:
    """Deliver the exports of a run by hand, with registration."""
    cfg = TrackingConfig(uri=uri, experiment="facts", register=name)
    store = MLflowRun(cfg, run, run.parent, run.name)
    FactsSync(run, cfg, "here").send_models(store.facts)


def test_a_store_without_a_registry_says_so(
    uri: str, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: MlflowClient, *_: Any, **__: Any) -> None:
        raise MlflowException("Model Registry features are not supported by the store", FEATURE_DISABLED)

    monkeypatch.setattr(MlflowClient, "search_model_versions", refuse)
    with caplog.at_level(logging.WARNING, "foveal"):
        attempt(tmp_path / "p" / "run", uri, register="digits")
    assert "takes no tracking.register: models are registered in a store with a database only" in caplog.text


def test_standard_tags_and_a_description_that_is_the_users(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run = tmp_path / "p" / "run"
    user = "me:secret"
    tags = {"user": "ada", "git.commit": "abc", "git.url": f"http://{user}@there/repo", "slurm.job": "7"}
    attempt(run, uri, "saved-and-left", tags=tags)
    first = stored(client, run)
    assert first.info.status == "SCHEDULED"
    assert "Saved and left as asked** (Slurm asked)" in first.data.tags["mlflow.note.content"]
    standard = {name: first.data.tags[f"mlflow.{name}"] for name in ("user", "source.name", "source.type")}
    assert standard == {"user": "ada", "source.name": "foveal train pretrain", "source.type": "JOB"}
    assert first.data.tags["mlflow.source.git.repoURL"] == "http://there/repo"
    assert (first.data.tags["stage"], list(first.data.params)) == ("pretrain", ["epochs", "seed"])
    client.set_tag(first.info.run_id, "mlflow.note.content", "what I think of it")
    attempt(run, uri)
    assert stored(client, run).data.tags["mlflow.note.content"] == "what I think of it"
    other = tmp_path / "p" / "other"
    attempt(other, uri, "saved-and-left")
    attempt(other, uri)
    note = stored(client, other).data.tags["mlflow.note.content"]
    assert "val\\_top1 **0.5**" in note and "Saved and left" not in note


def test_the_state_of_a_pipeline(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    seen = []
    for stage, state in [("a", "finished"), ("b", "saved-and-left"), ("b", "failed"), ("b", "finished")]:
        attempt(folder / stage, uri, state)  # type: ignore[arg-type]
        seen.append(stored(client, folder).info.status)
    assert seen == ["FINISHED", "SCHEDULED", "FAILED", "FINISHED"]
    parent, stages = stored(client, folder), [stored(client, folder / stage) for stage in "ab"]
    assert parent.data.metrics == {f"{stage}.val.{of}top1": value for stage in "ab" for of, value in _RESULTS.items()}
    assert parent.info.end_time == max(stage.info.end_time or 0 for stage in stages)
    assert len(client.get_metric_history(parent.info.run_id, "b.val.top1")) == 1
    assert "| b | finished |" in parent.data.tags["mlflow.note.content"]


_RESULTS = {"": 0.5, "holdout.": 0.25}


def test_a_pipeline_in_another_experiment_than_an_attempts_settings(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    """Runs stay in the experiment in which they began. A folder with somebody's config.yaml is a pipeline still."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    attempt(folder / "a", uri, "saved-and-left")
    attempt(folder / "a", uri, experiment="elsewhere")
    assert stored(client, folder).info.status == "FINISHED"
    attempt(folder / "b", uri, "failed", experiment="elsewhere")
    assert stored(client, folder).info.status == "FAILED"
    client.delete_run(run_id(folder / "a"))
    client.delete_run(run_id(folder / "b"))
    facts = MLflowRun(TrackingConfig(uri=uri, experiment="facts"), folder / "c", folder, "c").facts
    client.delete_run(run_id(folder / "c"))
    facts.update_pipeline({}, (0, 0))
    assert stored(client, folder).info.status == "FAILED", "nothing is there that says another state"


def test_a_pipeline_that_is_made_anew_has_its_stages(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    attempt(folder / "a", uri, "saved-and-left")
    client.delete_run(run_id(folder))
    attempt(folder / "a", uri)
    assert stored(client, folder / "a").data.tags["mlflow.parentRunId"] == run_id(folder)
    assert stored(client, folder).info.status == "FINISHED"


def test_stages_that_end_at_once(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    folder, stages = tmp_path / "pipeline", ("a", "b", "c")
    threads = [threading.Thread(target=attempt, args=(folder / stage, uri)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(client, folder).info.status == "FINISHED"
    assert {name.partition(".")[0] for name in stored(client, folder).data.metrics} == set(stages)


def test_a_run_that_is_a_parent_keeps_its_own_state(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    outer = tmp_path / "p" / "finetune"
    attempt(outer, uri, "saved-and-left")
    (outer / "science.json").write_text("{}")
    attempt(outer / "trial", uri)
    assert stored(client, outer).info.status == "SCHEDULED"
    assert "Saved and left" in stored(client, outer).data.tags["mlflow.note.content"]
    assert stored(client, outer / "trial").data.tags["mlflow.parentRunId"] == run_id(outer)


def test_the_kind_of_an_experiment(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    kinds = {"mine": "genai_development", "guessed": "genai_development_inferred", "none": ""}
    for name, kind in kinds.items():
        client.create_experiment(name, tags={"mlflow.experimentKind": kind} if kind else {})
    for name in (*kinds, "new"):
        MLflowRun(TrackingConfig(uri=uri, experiment=name), tmp_path / name, None, name)
    found = {name: client.get_experiment_by_name(name) for name in (*kinds, "new")}
    assert {name: entry.tags["mlflow.experimentKind"] for name, entry in found.items() if entry} == {
        "mine": "genai_development",
        **dict.fromkeys(("guessed", "none", "new"), "custom_model_development"),
    }


def test_params_of_an_older_version_stay(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = MLflowRun(TrackingConfig(uri=uri, experiment="old"), run, None, "old")
    store.set_params_tags_status({"log.every": 5, "seed": 1}, {"state": "running"})
    store.set_params_tags_status({"log.every": 7, "seed": 1, "lanes": 3, "ledger": 1}, {"state": "running"}, ["lanes"])
    found = stored(client, run).data
    assert found.params == {"log.every": "5", "seed": "1", "lanes": "3"}
    assert found.tags["changed.log.every"] == "7"
