"""MLflow: one parent run per pipeline, one child run per stage; a restarted stage continues its child run."""

import contextlib
import json
import logging
import os
import re
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

from foveal.redact import redact, redact_url_secrets
from foveal.renames import translate_setting
from foveal.tracking.sqlite_store import lock_store, parse_sqlite_path, prepare_store_and_artifacts
from foveal.tracking.store_errors import StoreRefusedError
from foveal.tracking.tracker import MetricPoint, TrackingConfig

_MAX_PARAMS = 90  # per request: MLflow's limit is 100 params and 100 tags
_MAX_PARAM_LENGTH = 6000  # characters; settings.json among the run's files has the complete values
_CREATION_TAG, _FOLDER_TAG = "foveal.opened", "foveal.folder"
# Seconds per request; retries, their number and their log lines are the uploader's business.
_MLFLOW_SETTINGS = {
    MLFLOW_HTTP_REQUEST_TIMEOUT: 10,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 0,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
}
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "saved-and-left": "KILLED"}  # any other state: FAILED

_log = logging.getLogger(__name__)


class MLflowRun:
    """A run in an MLflow store, through MlflowClient only: the fluent interface keeps global state.

    ``creation_token`` tags a run that is created here, because a request that seemed to fail may have created it.
    """

    def __init__(self, cfg: TrackingConfig, run_dir: Path, pipeline_dir: Path | None, creation_token: str) -> None:
        assert cfg.uri is not None
        # Failures are raised and logged by the uploader. Importing MLflow sets the levels, so this must come later.
        for logger_name in ("mlflow", "alembic"):
            logging.getLogger(logger_name).setLevel(logging.CRITICAL)
        uri, artifacts = prepare_store_and_artifacts(_expand_variables(cfg.uri))
        for variable, value in _MLFLOW_SETTINGS.items():
            if not variable.is_set():
                variable.set(value)
        with _lock_or_create_sqlite(uri, artifacts):
            self._client = MlflowClient(tracking_uri=uri)
            experiment = _get_or_create_experiment(self._client, cfg.experiment, artifacts)
        runs = _ExperimentRuns(self._client, cfg.uri, parse_sqlite_path(uri), experiment)
        self._parent_id = (
            None
            if pipeline_dir is None
            else runs.resume_or_create_run(pipeline_dir, {_CREATION_TAG: f"{creation_token}.pipeline"})
        )
        parent_tag = {} if self._parent_id is None else {MLFLOW_PARENT_RUN_ID: self._parent_id}
        self.run_id = runs.resume_or_create_run(run_dir, {_CREATION_TAG: creation_token, **parent_tag})

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

    def set_params_tags_status(self, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Set params, tags and status. A param can be written once: the value of a changed setting becomes a tag."""
        run_data = self._client.get_run(self.run_id).data
        stored_params, stored_tags = run_data.params, run_data.tags
        params = {name: redact(str(value))[:_MAX_PARAM_LENGTH] for name, value in settings.items()}
        new_params = [Param(name, value) for name, value in params.items() if name not in stored_params]
        for at in range(0, len(new_params), _MAX_PARAMS):
            self._log_params(new_params[at : at + _MAX_PARAMS])
        tags = {name: redact(value) for name, value in tags.items()}
        # A setting that differs from its param, or once did and was set back.
        changed = {
            tag: value
            for name, value in params.items()
            if (tag := f"changed.{name}") in stored_tags
            or translate_setting(name, stored_params.get(name, value))[1] != value
        }
        new_tags = [
            RunTag(name, value) for name, value in {**changed, **tags}.items() if stored_tags.get(name) != value
        ]
        for at in range(0, len(new_tags), _MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=new_tags[at : at + _MAX_PARAMS], synchronous=True)
        for run_id in filter(None, (self._parent_id, self.run_id)):
            self._set_status(run_id, _STATUS.get(tags["state"], "FAILED"))

    def _log_params(self, params: Sequence[Param]) -> None:
        """Log params; a request that was believed lost may log them at the same time, and the server then refuses."""
        try:
            self._client.log_batch(self.run_id, params=params, synchronous=True)
        except MlflowException:
            stored = self._client.get_run(self.run_id).data.params
            if any(stored.get(param.key) != param.value for param in params):
                raise

    def _set_status(self, run_id: str, status: str) -> None:
        if self._client.get_run(run_id).info.status != status:
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status)

    def list_files(self) -> dict[str, int]:
        artifacts = [file for folder in (None, "pictures") for file in self._client.list_artifacts(self.run_id, folder)]
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


def _get_or_create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, created if it is missing. Raises: StoreRefusedError if it is deleted."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        existing = client.get_experiment_by_name(name)  # another run was faster
        assert existing is not None
    if existing.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StoreRefusedError(f"experiment {name} is deleted: restore it or name another (tracking.experiment)")
    return str(existing.experiment_id)


@dataclass(frozen=True)
class _ExperimentRuns:
    """The runs of an experiment that belong to run directories. ``file``: the absolute path of an SQLite store."""

    client: MlflowClient
    store: str
    file: Path | None
    experiment: str

    def resume_or_create_run(self, folder: Path, tags: dict[str, str]) -> str:
        """Return the id of the run that belongs to a folder: the one in its note, or a new one.

        The note ``mlflow.json`` names its folder. A copy of the folder ignores the note while the original folder still
        holds it, so original and copy continue in runs of their own; if the original is gone, the folder was moved and
        keeps its run. Two processes that find no note both create a run; the first one's note stays, the other deletes
        its run and continues with the first's. A note about a run that this store does not have is succeeded in the same
        way, under a file name that contains the old run's id, so that it has one successor.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()  # "." has no name
        note_file = folder / "mlflow.json"
        file, new_run_id, reason = note_file, None, None
        while (note := _read_note(file)) is None or (rejection := self._explain_rejection(note, folder)):
            if note is not None:
                file, reason = folder / f".mlflow.json.after-{note['run_id']}", rejection
                continue
            new_run_id = new_run_id or self._create_run(folder, tags)
            new_note = {"run_id": new_run_id, "store": self.store, "folder": str(folder), **self._file_fact()}
            draft = _write_draft_note(note_file, new_note)
            with contextlib.suppress(FileExistsError):
                file.hardlink_to(draft)
            draft.unlink()
        if note.get("folder") != str(folder):  # a note of foveal 0.1 has no folder
            note |= {"folder": str(folder)}
            self.client.set_tag(note["run_id"], _FOLDER_TAG, str(folder))
            _write_draft_note(note_file, note | self._file_fact()).replace(note_file)
        elif file is not note_file or not self._file_fact().items() <= note.items():
            note |= self._file_fact()
            _write_draft_note(note_file, note).replace(note_file)
        if new_run_id == note["run_id"] and reason:
            _log.info("tracking: %s has a new run in MLflow, since that of its mlflow.json %s", folder, reason)
        elif new_run_id is not None and new_run_id != note["run_id"]:
            self.client.delete_run(new_run_id)
        return note["run_id"]

    def _file_fact(self) -> dict[str, str]:
        """Return the SQLite store's file for a note: the store of a later attempt that starts in another folder."""
        return {} if self.file is None else {"file": str(self.file)}

    def _explain_rejection(self, note: dict[str, str], folder: Path) -> str | None:
        """Return why the folder cannot continue the run of a note; None if it can."""
        is_same_file = self.file is not None and note.get("file") == str(self.file)
        if not is_same_file and _normalize_store_uri(note["store"]) != _normalize_store_uri(self.store):
            return "is another store's"
        try:
            run = self.client.get_run(note["run_id"])
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return "is not there"
            raise
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return "is deleted"
        owner = Path(note.get("folder") or run.data.tags.get(_FOLDER_TAG) or folder)
        return f"is that of {owner}, of which this is a copy" if _has_run_note(owner, note["run_id"], folder) else None

    def _create_run(self, folder: Path, tags: dict[str, str]) -> str:
        created_here = f"tags.`{_CREATION_TAG}` = '{tags[_CREATION_TAG]}'"
        if runs := self.client.search_runs([self.experiment], created_here, max_results=1):
            return str(runs[0].info.run_id)
        tags = tags | {MLFLOW_RUN_NAME: folder.name, _FOLDER_TAG: str(folder)}
        return str(self.client.create_run(self.experiment, tags=tags).info.run_id)


def _normalize_store_uri(store: str) -> str:
    """Return the URI without secrets, so that a secret and the variable that holds it compare equal."""
    return redact_url_secrets(os.path.expandvars(store))


def _has_run_note(other: Path, run_id: str, folder: Path) -> bool:
    """Whether another folder holds the note of a run.

    Links and mounts give one folder several names, also across hosts: a file created under one name is then visible under
    the other. An unreadable folder counts as another one: a superfluous run does no harm.
    """
    if other == folder:
        return False
    try:
        note = _read_note(other / "mlflow.json")
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)
    if note is None or note["run_id"] != run_id:
        return False
    probe = _write_draft_note(folder / "mlflow.json", {})
    try:
        return not (other / probe.name).exists()
    finally:
        probe.unlink()


def _read_note(file: Path) -> dict[str, str] | None:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_draft_note(file: Path, note: dict[str, str]) -> Path:
    """Write a note under a unique name beside ``file``; return its path."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(note) + "\n")
    return draft
