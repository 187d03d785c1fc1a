"""MLflow. One parent run for a pipeline, one child for each of its stages; a restarted stage goes on in its child."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from foveal.tracking.tracker import Point, TrackingConfig

_PARAMS = 90  # in a request: MLflow takes at most 100 params and as many tags
_LONGEST = 6000  # letters of a param; settings.json, among the run's files, has them all
_OPENED = "foveal.opened"
# Seconds for a request; who tries again, how often and with which words is the courier's business.
_OURS = {
    MLFLOW_HTTP_REQUEST_TIMEOUT: 10,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 0,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
}
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "saved-and-left": "KILLED"}  # any other state: FAILED


class MLflow:
    """A run in an MLflow store, through the client alone: the fluent interface keeps global state.

    ``opened`` marks a run that is made here: a request to make one that seemed to fail may have made it.
    """

    def __init__(self, cfg: TrackingConfig, run: Path, pipeline: Path | None, opened: str) -> None:
        assert cfg.uri is not None
        for chatty in ("mlflow", "alembic"):  # importing MLflow sets its level: quieting it earlier does not last
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri, artifacts = located(os.path.expandvars(cfg.uri))
        for name, value in _OURS.items():
            if not name.is_set():
                name.set(value)
        self._client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(self._client, cfg.experiment, artifacts)
        place = _Place(self._client, cfg.uri, experiment)
        self._parent = None if pipeline is None else place.continued(pipeline, {_OPENED: f"{opened}.pipeline"})
        above = {} if self._parent is None else {MLFLOW_PARENT_RUN_ID: self._parent}
        self.run = place.continued(run, {_OPENED: opened, **above})

    def newest(self) -> dict[str, int]:
        data = self._client.get_run(self.run).data
        return {metric.key: metric.step for metric in data.to_proto().metrics}  # data.metrics knows no steps

    def held(self, name: str) -> dict[int, int]:
        made: dict[int, int] = {}
        for metric in self._client.get_metric_history(self.run, name):
            made[metric.step] = max(metric.timestamp, made.get(metric.step, 0))
        return made

    def send(self, points: Sequence[Point]) -> None:
        metrics = [Metric(name, value, made, step) for name, value, made, step in points]
        self._client.log_batch(self.run, metrics=metrics, synchronous=True)

    def facts(self, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A param is written once: where a setting was changed since, a tag has its value."""
        found = self._client.get_run(self.run)
        known, wanted = found.data.params, {name: str(value)[:_LONGEST] for name, value in settings.items()}
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for at in range(0, len(new), _PARAMS):
            self._client.log_batch(self.run, params=new[at : at + _PARAMS], synchronous=True)
        told = found.data.tags
        changed = {f"changed.{name}": value for name, value in wanted.items() if known.get(name, value) != value}
        back = {tag: value for name, value in wanted.items() if (tag := f"changed.{name}") in told}
        fresh = [RunTag(name, value) for name, value in {**back, **changed, **tags}.items() if told.get(name) != value]
        for at in range(0, len(fresh), _PARAMS):
            self._client.log_batch(self.run, tags=fresh[at : at + _PARAMS], synchronous=True)
        for each in filter(None, (self._parent, self.run)):
            self._turn(each, _STATUS.get(tags["state"], "FAILED"))

    def _turn(self, run: str, status: str) -> None:
        if self._client.get_run(run).info.status != status:
            if status == "RUNNING":
                self._client.update_run(run, status=status)
            else:
                self._client.set_terminated(run, status)

    def files(self) -> dict[str, int]:
        names = [each for folder in (None, "pictures") for each in self._client.list_artifacts(self.run, folder)]
        return {each.path: each.file_size or 0 for each in names if not each.is_dir}

    def file(self, path: Path, folder: str) -> None:
        self._client.log_artifact(self.run, str(path), folder or None)


def located(uri: str) -> tuple[str, str | None]:
    """An SQLite store's absolute URI, and the folder of its artifacts beside it; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return uri, None
    file = Path(uri.removeprefix("sqlite:///")).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}", (file.parent / "mlartifacts").as_uri()


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        known = client.get_experiment_by_name(name)  # another run was quicker
        assert known is not None
    return str(known.experiment_id)


@dataclass(frozen=True)
class _Place:
    """An experiment of a store, and the runs in it that belong to folders."""

    client: MlflowClient
    store: str
    experiment: str

    def continued(self, folder: Path, tags: dict[str, str]) -> str:
        """The id of the run that belongs to a folder: noted there, made where this store has none.

        Two that find no note at once both make a run. The note is the first's; the other deletes its own and goes on
        with the first's. A note about a run that this store does not have is succeeded in the same way: under a name
        that holds the old run's, so that it has one successor.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()  # "." has no name
        note = folder / "mlflow.json"
        place, made = note, None
        while (noted := _read(place)) is None or not self._has(noted):
            if noted is not None:
                place = folder / f".mlflow.json.after-{noted['run_id']}"
                continue
            made = made or self._made(folder, tags)
            draft = _draft(note, {"run_id": made, "store": self.store})
            with contextlib.suppress(FileExistsError):
                place.hardlink_to(draft)
            draft.unlink()
        if place is not note:
            _draft(note, noted).replace(note)
        if made not in (None, noted["run_id"]):
            self.client.delete_run(made)
        return noted["run_id"]

    def _has(self, noted: dict[str, str]) -> bool:
        if noted["store"] != self.store:
            return False
        try:
            found = self.client.get_run(noted["run_id"])
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return False
            raise
        return found.info.lifecycle_stage == LifecycleStage.ACTIVE

    def _made(self, folder: Path, tags: dict[str, str]) -> str:
        mine = f"tags.`{_OPENED}` = '{tags[_OPENED]}'"
        if found := self.client.search_runs([self.experiment], mine, max_results=1):
            return str(found[0].info.run_id)
        tags = tags | {MLFLOW_RUN_NAME: folder.name, "foveal.folder": str(folder)}
        return str(self.client.create_run(self.experiment, tags=tags).info.run_id)


def _read(note: Path) -> dict[str, str] | None:
    return json.loads(note.read_text()) if note.exists() else None


def _draft(note: Path, value: dict[str, str]) -> Path:
    """A note under a name that nobody else has."""
    draft = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(value) + "\n")
    return draft
