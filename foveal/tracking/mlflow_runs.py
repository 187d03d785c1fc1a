"""Which run of MLflow a folder goes on in: the note ``mlflow.json`` in it, and runs that are made anew."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from foveal.atomic import read_json
from foveal.redact import redact_url_secrets
from foveal.tracking.tail import to_milliseconds

CREATION_TAG = "foveal.opened"
_FOLDER_TAG = "foveal.folder"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExperimentRuns:
    """The runs of an experiment that belong to run directories. ``file``: the absolute path of an SQLite store."""

    client: MlflowClient
    store: str
    file: Path | None
    experiment: str

    def resume_or_create_run(self, folder: Path, name: str, tags: dict[str, str]) -> str:
        """Return the id of the run that belongs to a folder: the one in its note, or a new one of this name.

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
            new_run_id = new_run_id or self._create_run(folder, name, tags)
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

    def is_own(self, note: Mapping[str, Any]) -> bool:
        """Whether a note names this store."""
        is_same_file = self.file is not None and note.get("file") == str(self.file)
        return is_same_file or _normalize_store_uri(str(note.get("store", ""))) == _normalize_store_uri(self.store)

    def _explain_rejection(self, note: dict[str, str], folder: Path) -> str | None:
        """Return why the folder cannot continue the run of a note; None if it can."""
        if not self.is_own(note):
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

    def _create_run(self, folder: Path, name: str, tags: dict[str, str]) -> str:
        created_here = f"tags.`{CREATION_TAG}` = '{tags[CREATION_TAG]}'"
        if runs := self.client.search_runs([self.experiment], created_here, max_results=1):
            return str(runs[0].info.run_id)
        tags = tags | {MLFLOW_RUN_NAME: name, _FOLDER_TAG: str(folder)}
        return str(self.client.create_run(self.experiment, read_start(folder), tags).info.run_id)


def read_start(folder: Path) -> int | None:
    """Return when a run began, in milliseconds, for one that is uploaded later; None if that is not recorded.

    A pipeline begins with its first stage.
    """
    records = [*folder.glob("attempts/0001.json"), *folder.glob("*/attempts/0001.json")]
    times = [record["time"] for file in records if isinstance((record := read_json(file)).get("time"), float)]
    return to_milliseconds(min(times)) if times else None


def read_end(folder: Path) -> int | None:
    """Return when the newest attempt at a run ended, in milliseconds; None if that is not recorded."""
    file = folder / "tags.json"
    return file.stat().st_mtime_ns // 10**6 if file.exists() else None


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
