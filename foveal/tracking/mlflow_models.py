"""Exports as MLflow's logged models, and as versions of a registered model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow.entities import Dataset, LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import FEATURE_DISABLED, RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

from foveal.redact import redact
from foveal.tracking.exported import Export
from foveal.tracking.mlflow_names import is_evaluation, name_model
from foveal.tracking.store_errors import StoreRefusedError
from foveal.tracking.tracker import MetricPoint

_IDENTITY, _EXPORT = "foveal.identity", "foveal.export"
_MAX_DESCRIPTION = 4900  # characters; MLflow's tables hold 5,000
_MAX_VALUE = 250  # characters of a param


@dataclass(frozen=True)
class ExportModels:
    """The models of one run."""

    client: MlflowClient
    experiment: str
    run_id: str
    run_name: str

    def find_or_create(self, export: Export) -> str:
        """Return the id of the model of an export, created if it is missing.

        A request that seemed to fail, or another process, may have created it: the oldest one stays.
        """
        if not (found := self._find(export)):
            created = self.client.create_logged_model(
                self.experiment,
                name=name_model(self.run_name, export.name),
                source_run_id=self.run_id,
                tags={
                    _IDENTITY: export.identity,
                    _EXPORT: export.name,
                    "path": redact(str(export.folder.resolve())),
                    "stage": export.stage,
                    "step": str(export.step),
                    "sha256": export.sha256,
                    MLFLOW_SOURCE_NAME: f"foveal train {export.stage}",
                    MLFLOW_SOURCE_TYPE: "LOCAL",
                    MLFLOW_RUN_NOTE: redact(export.read_description())[:_MAX_DESCRIPTION],
                },
                params={name: value[:_MAX_VALUE] for name, value in export.facts.items()},
                model_type=f"foveal {export.stage}".strip(),
            )
            found = self._find(export) or [created]
        for twin in found[1:]:
            self.client.delete_logged_model(twin.model_id)
        return str(found[0].model_id)

    def complete(
        self, model_id: str, export: Export, points: Sequence[MetricPoint], evaluated_on: Dataset | None
    ) -> None:
        """Upload the card, link metrics and data, make the model an output of the run, and mark it ready."""
        for file in export.small_files:
            self.client.log_model_artifact(model_id, str(file))
        if points:
            metrics = [_to_metric(point, model_id, evaluated_on) for point in points]
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        outputs = self.client.get_run(self.run_id).outputs
        if model_id not in {entry.model_id for entry in (outputs.model_outputs if outputs else ())}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, export.step)])
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)

    def mark_replaced(self, model_id: str, by: str) -> None:
        """Tag a model whose export has been replaced; whoever links to it still finds it."""
        self.client.set_logged_model_tags(model_id, {"foveal.replaced_by": by})

    def register(self, model_id: str, export: Export, name: str, alias: str | None) -> None:
        """Make a version of a registered model, one for each export, and set the alias.

        An alias that a newer version has stays there: an older run may be delivered later.
        Raises: StoreRefusedError if the store has no registry.
        """
        try:
            version = self._find_version(name, export) or self._create_version(model_id, export, name)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(FEATURE_DISABLED):
                raise StoreRefusedError(
                    "models are registered in a store with a database only: sqlite:///, postgresql:// or a server with one"
                ) from None
            raise
        self._link_version(model_id, name, str(version.version))
        holder = None if alias is None else self.client.get_registered_model(name).aliases.get(alias)
        if alias is not None and (holder is None or int(holder) < int(version.version)):
            self.client.set_registered_model_alias(name, alias, str(version.version))

    def _link_version(self, model_id: str, name: str, version: str) -> None:
        """Tag a model with its version, from which its page leads there; a server has done so, a plain store has not."""
        tagged = self.client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS)
        versions = json.loads(tagged) if tagged else []
        entry = {"name": name, "version": version}
        if not any({key: str(known.get(key)) for key in entry} == entry for known in versions):
            self.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, entry])})

    def _find(self, export: Export) -> list[LoggedModel]:
        """Return the models of an export, the oldest first."""
        mine = f"source_run_id = '{self.run_id}' AND tags.`{_IDENTITY}` = '{export.identity}'"
        found = self.client.search_logged_models([self.experiment], mine)
        models = [model for model in found if model.tags.get(_EXPORT) == export.name]
        return sorted(models, key=lambda model: (model.creation_timestamp, model.model_id))

    def _find_version(self, name: str, export: Export) -> ModelVersion | None:
        """Return the oldest version of an export. Those of an older foveal have no tag of the head."""
        quoted = name.replace("'", "''")
        versions = self.client.search_model_versions(f"name = '{quoted}'", max_results=1000)
        same = [
            version
            for version in versions
            if version.tags.get(_IDENTITY) == export.identity
            or (_IDENTITY not in version.tags and not export.has_head and version.tags.get("sha256") == export.sha256)
        ]
        return min(same, key=lambda version: int(version.version), default=None)

    def _create_version(self, model_id: str, export: Export, name: str) -> ModelVersion:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        return self.client.create_model_version(
            name,
            # Not models:/ID: a store without a server would look that up where MLFLOW_TRACKING_URI leads.
            source=str(self.client.get_logged_model(model_id).artifact_location),
            run_id=self.run_id,
            tags={
                _IDENTITY: export.identity,
                "stage": export.stage,
                "sha256": export.sha256,
                "step": str(export.step),
            },
            description=redact(export.read_description())[:_MAX_DESCRIPTION],
            await_creation_for=0,
            model_id=model_id,
        )


def _to_metric(point: MetricPoint, model_id: str, evaluated_on: Dataset | None) -> Metric:
    """Return a point of a model, with the data set that it was measured on if that is one of evaluation."""
    name, value, time, step = point
    if evaluated_on is None or not is_evaluation(name):
        return Metric(name, value, time, step, model_id=model_id)
    return Metric(
        name,
        value,
        time,
        step,
        model_id=model_id,
        dataset_name=evaluated_on.name,
        dataset_digest=evaluated_on.digest,
    )
