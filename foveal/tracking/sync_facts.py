"""What a store gets of a run beside rows, params and files: data sets, models, a description, the pipeline's state.

Everything here comes after the rows, and a store that does not take one of these facts gets the rest: an older server
costs a line in the log. A failure that may pass is raised, and everything is tried again, without a second copy.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from foveal.errors import CheckpointError
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, read_inputs
from foveal.tracking.description import describe_run, read_results
from foveal.tracking.exported import (
    Export,
    LoggedExport,
    list_exports,
    read_logged_exports,
    write_logged_export,
)
from foveal.tracking.store_errors import explain_missing_feature, is_unknown_feature
from foveal.tracking.tail import read_json_or_empty
from foveal.tracking.tracker import MetricPoint, TrackingConfig

_MAX_FAILURES = 8  # of one fact in a row, while rows arrive
_SIGNED_FILES = ("tags.json", "inputs.json", "finished.json", "settings.json")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class RemoteFacts(Protocol):
    """What a store can know of a run beside its rows. Every method may raise whatever the store's library raises.

    A method that is repeated leaves one copy.
    """

    @property
    def run_id(self) -> str:
        """The store's id of the run."""
        ...

    def is_own_store(self, note: Mapping[str, Any]) -> bool:
        """Whether the note ``mlflow.json`` of another run names this store."""
        ...

    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        """Log the data sets as inputs of the run."""
        ...

    def log_input_models(self, linked: Mapping[str, str], unlinked: Sequence[ModelInput]) -> None:
        """Log the models that the run was made from. linked: role to the store's id; unlinked: those without one."""
        ...

    def describe(self, stage: str, tags: Mapping[str, str], description: str) -> None:
        """Set the store's standard tags, and the description unless a user has edited it."""
        ...

    def update_pipeline(self, results: Mapping[str, float], at: tuple[int, int]) -> None:
        """Bring the pipeline's run up to date: state, end, results of this stage. at: (milliseconds, step) of these."""
        ...

    def find_or_create_model(self, export: Export) -> str:
        """Return the id of the model of an export, created if it is missing."""
        ...

    def complete_model(
        self, model_id: str, export: Export, points: Sequence[MetricPoint], data: RunInputs | None
    ) -> None:
        """Add card, metrics and the data sets of these to a model, make it an output of the run, mark it ready."""
        ...

    def mark_replaced(self, model_id: str, by: str) -> None:
        """Mark the model of an export that another one has replaced."""
        ...

    def upload_weights(self, model_id: str, export: Export) -> None:
        """Upload all files of an export."""
        ...

    def register_model(self, model_id: str, export: Export, name: str, alias: str | None) -> None:
        """Make a version of a registered model, and give it the alias."""
        ...


class FactsSync:
    """Sends the facts of one run directory. In the uploader's thread only."""

    def __init__(self, run_dir: Path, cfg: TrackingConfig, store_name: str) -> None:
        self._run, self._cfg, self._store_name = run_dir, cfg, store_name
        self._sent_signature: Any = None
        self._checked_exports: Any = None
        self._missing: set[str] = set()  # what the store does not take
        self._failures: dict[str, int] = {}

    def reset(self) -> None:
        """Send everything again: the connection is new."""
        self._sent_signature = self._checked_exports = None

    def send_facts(self, store: RemoteFacts) -> None:
        """Send data sets, input models, description and the pipeline's state, if anything has changed."""
        signature = [_signature(self._run / name) for name in _SIGNED_FILES]
        if signature == self._sent_signature:
            return
        inputs, tags = self._read_inputs(), read_json_or_empty(self._run / "tags.json") or {"state": "running"}
        if inputs is not None:
            self._try("data sets of runs", lambda: store.log_datasets(inputs.datasets))
            self._try("models as inputs of runs", lambda: self._log_input_models(store, inputs))
        stage = inputs.stage if inputs else str(read_json_or_empty(self._run / "plan.json").get("stage", ""))
        results = self._read_or_warn(lambda: read_results(self._run), {})
        settings = read_json_or_empty(self._run / "settings.json")
        text = describe_run(self._run, stage, settings, tags, inputs, results)
        self._try("standard tags", lambda: store.describe(stage, tags, text))
        final = results if tags.get("state") == "finished" else {}
        at = _signature(self._run / "finished.json")
        self._try("state of a pipeline", lambda: store.update_pipeline(final, (at[0] // 10**6, 0)))
        self._sent_signature = signature

    def send_models(self, store: RemoteFacts) -> None:
        """Send the exports that the store does not have as models, and register them once the run is finished."""
        files = sorted((self._run / "export").rglob("card.json"))
        checked = [(file, *_signature(file)) for file in files], _signature(self._run / "tags.json")
        if checked == self._checked_exports:
            return
        for export in list_exports(self._run):
            self._try("models", lambda export=export: self._send_model(store, export), export.name)
        self._checked_exports = checked

    def _send_model(self, store: RemoteFacts, export: Export) -> None:
        noted = read_logged_exports(self._run, store.run_id).get(export.name)
        entry = noted
        if noted is None or noted.identity != export.identity or not noted.is_complete:
            model_id = store.find_or_create_model(export)
            entry = LoggedExport(model_id, export.identity, export.sha256, export.step)
            write_logged_export(self._run, store.run_id, export.name, entry)
            store.complete_model(model_id, export, export.find_points(self._run), self._read_inputs())
            if noted is not None and noted.model_id != model_id:
                store.mark_replaced(noted.model_id, model_id)
            entry = self._note(store, export, LoggedExport(**{**entry.__dict__, "is_complete": True}))
        assert entry is not None
        if self._cfg.upload_models and not entry.has_weights:
            self._try("weights of models", lambda: self._upload_weights(store, export, entry), export.name)
        is_finished = read_json_or_empty(self._run / "tags.json").get("state") == "finished"
        if self._cfg.register is not None and is_finished:
            name, alias = _registered_name(self._cfg.register, export), self._cfg.alias
            register = partial(store.register_model, entry.model_id, export, name, alias)
            self._try("tracking.register", register, export.name)

    def _upload_weights(self, store: RemoteFacts, export: Export, entry: LoggedExport) -> None:
        store.upload_weights(entry.model_id, export)
        self._note(store, export, LoggedExport(**{**entry.__dict__, "has_weights": True}))

    def _note(self, store: RemoteFacts, export: Export, entry: LoggedExport) -> LoggedExport:
        write_logged_export(self._run, store.run_id, export.name, entry)
        return entry

    def _log_input_models(self, store: RemoteFacts, inputs: RunInputs) -> None:
        linked = {model.role: found for model in inputs.models if (found := find_source_model(model, store))}
        store.log_input_models(linked, [model for model in inputs.models if model.role not in linked])

    def _read_inputs(self) -> RunInputs | None:
        return self._read_or_warn(lambda: read_inputs(self._run), None)

    def _read_or_warn(self, read: Callable[[], _T], default: _T) -> _T:
        """Read a file of the run; a damaged one is said once, and costs what it says."""
        try:
            return read()
        except CheckpointError as error:
            if str(error) not in self._missing:
                self._missing.add(str(error))
                _log.warning("tracking: %s; %s gets the rest", error, self._store_name)
            return default

    def _try(self, feature: str, send: Callable[[], None], export: str = "") -> None:
        """Send one fact. export: the one that it is of; one that the store does not take stops no other.

        Raises: what ``send`` raised, unless the store does not take such facts.
        """
        fact = f"{feature} ({export})" if export else feature
        if not self._missing.isdisjoint((feature, fact)):
            return
        try:
            send()
        except Exception as error:
            self._failures[fact] = self._failures.get(fact, 0) + 1
            reason = explain_missing_feature(error)
            if reason is None and self._failures[fact] < _MAX_FAILURES:
                raise
            self._warn(
                feature if is_unknown_feature(error) else fact, reason or f"{type(error).__name__}, again and again"
            )
        else:
            self._failures.pop(fact, None)

    def _warn(self, feature: str, reason: str) -> None:
        if feature not in self._missing:
            self._missing.add(feature)
            _log.warning("tracking: %s takes no %s: %s (the rest goes on)", self._store_name, feature, reason)


def find_source_model(model: ModelInput, store: RemoteFacts) -> str | None:
    """Return the store's id of a run's input model, from the notes of the run that made it; None without such a note."""
    folders = [Path(model.inputs.run)] if model.inputs is not None else []
    folders += [Path(model.path), *list(Path(model.path).parents)[:3]]  # run/export/student, or run/kept/step
    for folder in folders:
        try:
            note = read_json_or_empty(folder / "mlflow.json")
        except (CheckpointError, OSError):
            continue
        if not note or not store.is_own_store(note):
            continue
        entries = read_logged_exports(folder, str(note.get("run_id", ""))).values()
        for entry in entries:
            is_fork_source = model.role == "fork" and entry.step == model.step
            if entry.sha256 == model.sha256 or is_fork_source:
                return entry.model_id
    return None


def _registered_name(name: str, export: Export) -> str:
    """Return the registered model's name: one of several students has its own after it."""
    student = "-".join(Path(export.name).parts[1:])
    return f"{name}-{student}" if student else name


def _signature(file: Path) -> tuple[int, int]:
    """Return (time of the last change in ns, size) of a file; zeros without one."""
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size
