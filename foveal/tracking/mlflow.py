"""MLflow. One parent run for a pipeline, one child for each of its stages; a restarted stage goes on in its child."""

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

from foveal.redact import redact, redact_urls
from foveal.tracking.sqlite_store import lock_store, parse_sqlite_path, resolve_store_uri
from foveal.tracking.store_errors import StoreRefusedError
from foveal.tracking.tracker import MetricPoint, TrackingConfig

_PARAMS = 90  # in a request: MLflow takes at most 100 params and as many tags
_LONGEST = 6000  # letters of a param; settings.json, among the run's files, has them all
_OPENED, _FOLDER = "foveal.opened", "foveal.folder"
# Seconds for a request; who tries again, how often and with which words is the courier's business.
_OURS = {
    MLFLOW_HTTP_REQUEST_TIMEOUT: 10,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 0,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
}
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "saved-and-left": "KILLED"}  # any other state: FAILED

_log = logging.getLogger(__name__)


class MLflowRun:
    """A run in an MLflow store, through the client alone: the fluent interface keeps global state.

    ``opened`` marks a run that is made here: a request to make one that seemed to fail may have made it.
    """

    def __init__(self, cfg: TrackingConfig, run_dir: Path, pipeline_dir: Path | None, creation_token: str) -> None:
        assert cfg.uri is not None
        for chatty in ("mlflow", "alembic"):  # importing MLflow sets its level: quieting it earlier does not last
            logging.getLogger(chatty).setLevel(logging.CRITICAL)  # what fails is raised, and the courier says it
        uri, artifacts = resolve_store_uri(_expand_variables(cfg.uri))
        for name, value in _OURS.items():
            if not name.is_set():
                name.set(value)
        with _lock_or_create_sqlite(uri, artifacts):
            self._client = MlflowClient(tracking_uri=uri)
            experiment = _get_or_create_experiment(self._client, cfg.experiment, artifacts)
        place = _ExperimentRuns(self._client, cfg.uri, experiment)
        self._parent = (
            None
            if pipeline_dir is None
            else place.resume_or_create_run(pipeline_dir, {_OPENED: f"{creation_token}.pipeline"})
        )
        above = {} if self._parent is None else {MLFLOW_PARENT_RUN_ID: self._parent}
        self.run_id = place.resume_or_create_run(run_dir, {_OPENED: creation_token, **above})

    def get_latest_steps(self) -> dict[str, int]:
        data = self._client.get_run(self.run_id).data
        return {metric.key: metric.step for metric in data.to_proto().metrics}  # data.metrics knows no steps

    def get_step_timestamps(self, name: str) -> dict[int, int]:
        made: dict[int, int] = {}
        for metric in self._client.get_metric_history(self.run_id, name):
            made[metric.step] = max(metric.timestamp, made.get(metric.step, 0))
        return made

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        metrics = [Metric(name, value, made, step) for name, value, made, step in points]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def set_params_and_tags(self, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A param is written once: where a setting was changed since, a tag has its value."""
        found = self._client.get_run(self.run_id)
        known, wanted = found.data.params, {name: redact(str(value))[:_LONGEST] for name, value in settings.items()}
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for at in range(0, len(new), _PARAMS):
            self._client.log_batch(self.run_id, params=new[at : at + _PARAMS], synchronous=True)
        told, tags = found.data.tags, {name: redact(value) for name, value in tags.items()}
        changed = {f"changed.{name}": value for name, value in wanted.items() if known.get(name, value) != value}
        back = {tag: value for name, value in wanted.items() if (tag := f"changed.{name}") in told}
        fresh = [RunTag(name, value) for name, value in {**back, **changed, **tags}.items() if told.get(name) != value]
        for at in range(0, len(fresh), _PARAMS):
            self._client.log_batch(self.run_id, tags=fresh[at : at + _PARAMS], synchronous=True)
        for each in filter(None, (self._parent, self.run_id)):
            self._turn(each, _STATUS.get(tags["state"], "FAILED"))

    def _turn(self, run: str, status: str) -> None:
        if self._client.get_run(run).info.status != status:
            if status == "RUNNING":
                self._client.update_run(run, status=status)
            else:
                self._client.set_terminated(run, status)

    def list_files(self) -> dict[str, int]:
        names = [each for folder in (None, "pictures") for each in self._client.list_artifacts(self.run_id, folder)]
        return {each.path: each.file_size or 0 for each in names if not each.is_dir}

    def upload_file(self, path: Path, folder: str) -> None:
        self._client.log_artifact(self.run_id, str(path), folder or None)


def _expand_variables(uri: str) -> str:
    """A URI with environment variables replaced. Raises: Refused for one that is not set."""
    found = os.path.expandvars(uri)
    if unset := re.search(r"\$\{(\w+)\}", found):
        raise StoreRefusedError(f"tracking.uri needs the environment variable {unset[1]}, which is not set")
    return found


def _lock_or_create_sqlite(uri: str, artifacts: str | None) -> contextlib.AbstractContextManager[None]:
    """While nobody else makes or upgrades an SQLite store, which is there then."""

    def make(draft: Path) -> None:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # a server's runs do without it

        SqlAlchemyStore(f"sqlite:///{draft}", artifacts).engine.dispose()

    file = parse_sqlite_path(uri)
    return contextlib.nullcontext() if file is None else lock_store(file, make)


def _get_or_create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of an experiment, made where there is none. Raises: Refused for one that is in the trash."""
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        known = client.get_experiment_by_name(name)  # another run was quicker
        assert known is not None
    if known.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StoreRefusedError(f"experiment {name} is deleted: restore it or name another (tracking.experiment)")
    return str(known.experiment_id)


@dataclass(frozen=True)
class _ExperimentRuns:
    """An experiment of a store, and the runs in it that belong to folders."""

    client: MlflowClient
    store: str
    experiment: str

    def resume_or_create_run(self, folder: Path, tags: dict[str, str]) -> str:
        """The id of the run that belongs to a folder: noted there, made where this store has none.

        A note names its folder. In a copy of that folder it is not believed while the folder still holds it, so that
        original and copy go on in runs of their own; where it does not, the folder was moved, and its run goes on. Two that find no note at once both make a run. The note is the first's; the other deletes its own and goes on
        with the first's. A note about a run that this store does not have is succeeded in the same way: under a name
        that holds the old run's, so that it has one successor.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()  # "." has no name
        note = folder / "mlflow.json"
        place, made, why = note, None, None
        while (noted := _read_note(place)) is None or (no := self._not_ours(noted, folder)):
            if noted is not None:
                place, why = folder / f".mlflow.json.after-{noted['run_id']}", no
                continue
            made = made or self._made(folder, tags)
            draft = _write_draft_note(note, {"run_id": made, "store": self.store, "folder": str(folder)})
            with contextlib.suppress(FileExistsError):
                place.hardlink_to(draft)
            draft.unlink()
        if noted.get("folder") != str(folder):  # a note of foveal 0.1 does not say
            noted |= {"folder": str(folder)}
            self.client.set_tag(noted["run_id"], _FOLDER, str(folder))
            _write_draft_note(note, noted).replace(note)
        elif place is not note:
            _write_draft_note(note, noted).replace(note)
        if made == noted["run_id"] and why:
            _log.info("tracking: %s has a new run in MLflow, since that of its mlflow.json %s", folder, why)
        elif made is not None and made != noted["run_id"]:
            self.client.delete_run(made)
        return noted["run_id"]

    def _not_ours(self, noted: dict[str, str], folder: Path) -> str | None:
        """Why the run of a note is not the folder's to go on in; nothing where it is."""
        if _normalize_store_uri(noted["store"]) != _normalize_store_uri(self.store):
            return "is another store's"
        try:
            found = self.client.get_run(noted["run_id"])
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return "is not there"
            raise
        if found.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return "is deleted"
        place = Path(noted.get("folder") or found.data.tags.get(_FOLDER) or folder)
        return f"is that of {place}, of which this is a copy" if _has_run_note(place, noted["run_id"], folder) else None

    def _made(self, folder: Path, tags: dict[str, str]) -> str:
        mine = f"tags.`{_OPENED}` = '{tags[_OPENED]}'"
        if found := self.client.search_runs([self.experiment], mine, max_results=1):
            return str(found[0].info.run_id)
        tags = tags | {MLFLOW_RUN_NAME: folder.name, _FOLDER: str(folder)}
        return str(self.client.create_run(self.experiment, tags=tags).info.run_id)


def _normalize_store_uri(store: str) -> str:
    """What is equal for two ways to write the URI of a store: with a secret, and with the variable that has it."""
    return redact_urls(os.path.expandvars(store))


def _has_run_note(place: Path, run: str, folder: Path) -> bool:
    """Whether a place other than the folder holds the note of a run.

    Links and mounts give a folder several names, on several hosts too: what is made under one of them is then seen
    under the other. A place that may not be looked into counts as one that does: a run too many mixes nothing up.
    """
    if place == folder:
        return False
    try:
        theirs = _read_note(place / "mlflow.json")
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)
    if theirs is None or theirs["run_id"] != run:
        return False
    probe = _write_draft_note(folder / "mlflow.json", {})
    try:
        return not (place / probe.name).exists()
    finally:
        probe.unlink()


def _read_note(note: Path) -> dict[str, str] | None:
    try:
        return json.loads(note.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_draft_note(note: Path, value: dict[str, str]) -> Path:
    """A note under a name that nobody else has."""
    draft = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(value) + "\n")
    return draft
