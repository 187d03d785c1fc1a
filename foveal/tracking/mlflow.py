"""MLflow: one parent run per pipeline, one child run per stage; a restarted stage continues its child run."""

import contextlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from foveal.redact import redact
from foveal.renames import translate_setting
from foveal.tracking.mlflow_facts import MLflowFacts
from foveal.tracking.mlflow_names import name_run
from foveal.tracking.mlflow_runs import CREATION_TAG, ExperimentRuns, read_end
from foveal.tracking.mlflow_status import set_status, status_of
from foveal.tracking.params import choose_params, is_param
from foveal.tracking.sqlite_store import lock_store, parse_sqlite_path, prepare_store_and_artifacts
from foveal.tracking.store_errors import StoreRefusedError
from foveal.tracking.sync_facts import RemoteFacts
from foveal.tracking.tracker import MetricPoint, TrackingConfig

_MAX_PARAMS = 90  # per request: MLflow's limit is 100 params and 100 tags
_MAX_PARAM_LENGTH = 6000  # characters; settings.json among the run's files has the complete values
# Seconds per request; retries, their number and their log lines are the uploader's business.
_MLFLOW_SETTINGS = {
    MLFLOW_HTTP_REQUEST_TIMEOUT: 10,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 0,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
}

_log = logging.getLogger(__name__)


class MLflowRun:
    """A run in an MLflow store, through MlflowClient only: the fluent interface keeps global state.

    ``creation_token`` tags a run that is created here, because a request that seemed to fail may have created it.
    """

    def __init__(self, cfg: TrackingConfig, run_dir: Path, parent_dir: Path | None, creation_token: str) -> None:
        """``parent_dir``: of the run's pipeline, or of the run that contains this trial or fold."""
        assert cfg.uri is not None
        # Failures are raised and logged by the uploader. Importing MLflow sets the levels, so this must come later.
        for logger_name in ("mlflow", "alembic"):
            logging.getLogger(logger_name).setLevel(logging.CRITICAL)
        self._run_dir = run_dir
        uri, artifacts = prepare_store_and_artifacts(_expand_variables(cfg.uri))
        for variable, value in _MLFLOW_SETTINGS.items():
            if not variable.is_set():
                variable.set(value)
        with _lock_or_create_sqlite(uri, artifacts):
            self._client = MlflowClient(tracking_uri=uri)
            experiment = _get_or_create_experiment(self._client, cfg.experiment, artifacts)
        runs = ExperimentRuns(self._client, cfg.uri, parse_sqlite_path(uri), experiment)
        parent = None if parent_dir is None else parent_dir.resolve()
        parent_id = (
            None
            if parent is None
            else runs.resume_or_create_run(parent, parent.name, {CREATION_TAG: f"{creation_token}.pipeline"})
        )
        # A run that contains others has a state and results of its own, which none of them sets.
        is_nested = parent is not None and (parent / "science.json").exists()
        parent_tag = {} if parent_id is None else {MLFLOW_PARENT_RUN_ID: parent_id}
        run_name = run_dir.resolve().name if is_nested else name_run(run_dir.resolve(), parent)
        self.run_id = runs.resume_or_create_run(run_dir, run_name, {CREATION_TAG: creation_token, **parent_tag})
        if parent_id is not None:
            self._follow_parent(parent_id)
        pipeline_id = None if is_nested else parent_id
        self.facts: RemoteFacts = MLflowFacts(self._client, runs, self.run_id, pipeline_id, run_name)

    def _follow_parent(self, parent_id: str) -> None:
        """Put the run below its parent, which has a new run after somebody has deleted its first one."""
        if self._client.get_run(self.run_id).data.tags.get(MLFLOW_PARENT_RUN_ID) != parent_id:
            self._client.set_tag(self.run_id, MLFLOW_PARENT_RUN_ID, parent_id)

    def get_latest_steps(self) -> dict[str, int]:
        data = self._client.get_run(self.run_id).data
        return {metric.key: metric.step for metric in data.to_proto().metrics}  # data.metrics has no steps

    def get_step_timestamps(self, metric_name: str) -> dict[int, int]:
        timestamps: dict[int, int] = {}
        for metric in self._client.get_metric_history(self.run_id, metric_name):
            timestamps[metric.step] = max(metric.timestamp, timestamps.get(metric.step, 0))
        return timestamps

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        metrics = [Metric(name, value, timestamp, step) for name, value, timestamp, step in points]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def set_params_tags_status(
        self, settings: Mapping[str, Any], tags: Mapping[str, str], changed: Sequence[str] | None = None
    ) -> None:
        """Set params, tags and status. A param can be written once: the value of a changed setting becomes a tag.

        changed: names of the settings that are params beside a core of settings; None: all settings are params.
        """
        run = self._client.get_run(self.run_id)
        stored_params, stored_tags = run.data.params, run.data.tags
        names = settings if changed is None else choose_params(settings, changed)
        params = {
            name: redact(str(settings[name]))[:_MAX_PARAM_LENGTH]
            for name in dict.fromkeys([*names, *settings])  # MLflow's page shows them in the order of their arrival
            if is_param(name, names, stored_params)
        }
        new_params = [Param(name, value) for name, value in params.items() if name not in stored_params]
        for at in range(0, len(new_params), _MAX_PARAMS):
            self._log_params(new_params[at : at + _MAX_PARAMS])
        tags = {name: redact(value) for name, value in tags.items()}
        # A setting that differs from its param, or once did and was set back.
        changed_params = {
            tag: value
            for name, value in params.items()
            if (tag := f"changed.{name}") in stored_tags
            or translate_setting(name, stored_params.get(name, value))[1] != value
        }
        new_tags = [
            RunTag(name, value) for name, value in {**changed_params, **tags}.items() if stored_tags.get(name) != value
        ]
        for at in range(0, len(new_tags), _MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=new_tags[at : at + _MAX_PARAMS], synchronous=True)
        status = status_of(tags["state"])
        set_status(self._client, self.run_id, status, None if status == "RUNNING" else read_end(self._run_dir))

    def _log_params(self, params: Sequence[Param]) -> None:
        """Log params; a request that was believed lost may log them at the same time, and the server then refuses."""
        try:
            self._client.log_batch(self.run_id, params=params, synchronous=True)
        except MlflowException:
            stored = self._client.get_run(self.run_id).data.params
            if any(stored.get(param.key) != param.value for param in params):
                raise

    def list_files(self) -> dict[str, int]:
        folders = (None, "pictures")
        try:
            artifacts = [file for folder in folders for file in self._client.list_artifacts(self.run_id, folder)]
        except MlflowException as error:  # MLflow's client looks for models among them, which an older server has not
            if error.error_code != ErrorCode.Name(ENDPOINT_NOT_FOUND):
                raise
            return {}
        return {file.path: file.file_size or 0 for file in artifacts if not file.is_dir}

    def upload_file(self, path: Path, remote_folder: str) -> None:
        self._client.log_artifact(self.run_id, str(path), remote_folder or None)


def _expand_variables(uri: str) -> str:
    """Replace environment variables in a URI. Raises: StoreRefusedError for an unset variable."""
    expanded = os.path.expandvars(uri)
    if unset := re.search(r"\$\{(\w+)\}", expanded):
        raise StoreRefusedError(f"tracking.uri needs the environment variable {unset[1]}, which is not set")
    return expanded


def _lock_or_create_sqlite(uri: str, artifacts: str | None) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of an SQLite store and create the store if it is missing; do nothing for other stores."""

    def create(draft: Path) -> None:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # not needed with a server

        SqlAlchemyStore(f"sqlite:///{draft}", artifacts).engine.dispose()

    file = parse_sqlite_path(uri)
    return contextlib.nullcontext() if file is None else lock_store(file, create)


# The page that opens for an experiment: MLflow has one for models that are trained and one for chat bots. It guesses.
_KIND_TAG, _KIND, _GUESSED_KINDS = "mlflow.experimentKind", "custom_model_development", ("", "no_inferred_type")


def _get_or_create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, created if it is missing. Raises: StoreRefusedError if it is deleted.

    An experiment without a kind, or with one that MLflow's page has guessed, becomes one of models that are trained.
    """
    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags={_KIND_TAG: _KIND}))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        existing = client.get_experiment_by_name(name)  # another run was faster
        assert existing is not None
    if existing.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StoreRefusedError(f"experiment {name} is deleted: restore it or name another (tracking.experiment)")
    kind = existing.tags.get(_KIND_TAG, "")
    if kind in _GUESSED_KINDS or kind.endswith("_inferred"):
        client.set_experiment_tag(existing.experiment_id, _KIND_TAG, _KIND)
    return str(existing.experiment_id)
