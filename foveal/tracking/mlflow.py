"""MLflow. One parent run for a pipeline, one child for each of its stages; a restarted stage goes on in its child."""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from foveal.files import write_json
from foveal.tracking.tracker import Row, Status, TrackingConfig

_BATCH = 900  # MLflow takes at most 1,000 metrics and 100 params a request
_PARAMS = 90


class MLflow:
    """A run in an MLflow store, through the client alone: the fluent interface keeps global state."""

    def __init__(self, cfg: TrackingConfig, run: Path, pipeline: Path | None) -> None:
        assert cfg.uri is not None
        for chatty in ("mlflow", "alembic"):  # importing MLflow sets its level: quieting it earlier does not last
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri, artifacts = _store(os.path.expandvars(cfg.uri))
        for limit, most in ((MLFLOW_HTTP_REQUEST_TIMEOUT, 10), (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 1)):
            if not limit.is_set():
                limit.set(most)  # MLflow's own patience is minutes, and the run would wait with it
        self._client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(self._client, cfg.experiment, artifacts)
        self._parent = None if pipeline is None else _continued(self._client, cfg.uri, experiment, pipeline, {})
        tags = {} if self._parent is None else {MLFLOW_PARENT_RUN_ID: self._parent}
        self._run = _continued(self._client, cfg.uri, experiment, run, tags)
        for each in filter(None, (self._parent, self._run)):
            self._client.update_run(each, status="RUNNING")
        self._pending: list[Metric] = []
        logged = self._client.get_metric_history(self._run, "loss")
        self._delivered = max((metric.step for metric in logged), default=0)

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        known = self._client.get_run(self._run).data.params
        new = [Param(name, str(value)) for name, value in flat.items() if name not in known]
        for at in range(0, len(new), _PARAMS):
            self._client.log_batch(self._run, params=new[at : at + _PARAMS])
        changed = {name: value for name, value in flat.items() if name in known and known[name] != str(value)}
        tags = tags | {f"changed.{name}": str(value) for name, value in changed.items()}  # a param is written once
        self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in tags.items()])

    def rows(self, rows: Sequence[Row]) -> None:
        """Rows at steps that an earlier attempt delivered are the same numbers, and are not counted twice."""
        new = [row for row in rows if row["step"] > self._delivered]
        self._delivered = max([self._delivered, *(int(row["step"]) for row in rows)])
        self._deliver([(name, value, int(row["step"])) for row in new for name, value in row.items() if name != "step"])

    def results(self, results: Row, step: int) -> None:
        """As for rows: what an earlier attempt delivered is not counted twice."""
        known = {name: {m.step for m in self._client.get_metric_history(self._run, name)} for name in results}
        self._deliver([(name, value, step) for name, value in results.items() if step not in known[name]])

    def _deliver(self, numbers: list[tuple[str, float, int]]) -> None:
        """Send numbers, after those that an earlier call could not send; a store takes the same metric only once."""
        now = int(time.time() * 1000)
        self._pending += [Metric(name, value, now, step) for name, value, step in numbers]
        while self._pending:
            self._client.log_batch(self._run, metrics=self._pending[:_BATCH])
            del self._pending[:_BATCH]

    def file(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path), path.parent.name if path.parent.name == "pictures" else None)

    def close(self, status: Status) -> None:
        for each in filter(None, (self._run, self._parent)):
            self._client.set_terminated(each, status)


def _store(uri: str) -> tuple[str, str | None]:
    """An SQLite store's absolute URI, and the folder of its artifacts beside it; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return uri, None
    file = Path(uri.removeprefix("sqlite:///")).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}", (file.parent / "mlartifacts").as_uri()


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    known = client.get_experiment_by_name(name)
    return str(known.experiment_id) if known else str(client.create_experiment(name, artifact_location=artifacts))


def _continued(client: MlflowClient, store: str, experiment: str, folder: Path, tags: dict[str, str]) -> str:
    """The id of the MLflow run that belongs to a folder: noted there, made where this store has none."""
    note = folder / "mlflow.json"
    if note.exists():
        noted = json.loads(note.read_text())
        if noted.get("store") == store and _is_there(client, noted["run_id"]):
            return str(noted["run_id"])
    run = client.create_run(experiment, tags=tags | {MLFLOW_RUN_NAME: folder.name, "foveal.folder": str(folder)})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, {"run_id": run.info.run_id, "store": store})
    return str(run.info.run_id)


def _is_there(client: MlflowClient, run: str) -> bool:
    try:
        client.get_run(run)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return False
        raise
    return True
