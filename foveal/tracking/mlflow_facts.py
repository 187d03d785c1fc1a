"""What MLflow 3 knows of a run beside its rows: data sets, models and versions of them, standard tags, the pipeline."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Dataset, InputTag, LoggedModelInput, Metric, Run, RunTag
from mlflow.entities import DatasetInput as MLflowDatasetInput
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from foveal.redact import redact
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs
from foveal.tracking.description import main_results
from foveal.tracking.exported import Export
from foveal.tracking.mlflow_models import ExportModels
from foveal.tracking.mlflow_names import name_stage_result
from foveal.tracking.mlflow_runs import ExperimentRuns
from foveal.tracking.mlflow_status import combine_statuses, set_status
from foveal.tracking.tracker import MetricPoint

_MAX_DIGEST, _MAX_SOURCE, _MAX_TAG = 36, 60_000, 480  # characters
_UPLOAD_SECONDS = 600  # for a file of weights
_MAX_STAGE_RESULTS = 8  # of a stage in its pipeline's run
_DESCRIBED_TAG = "foveal.described"  # digest of the description that foveal has set
_TAGS = {
    "user": MLFLOW_USER,
    "git.commit": MLFLOW_GIT_COMMIT,
    "git.branch": MLFLOW_GIT_BRANCH,
    "git.url": MLFLOW_GIT_REPO_URL,
}


@dataclass(frozen=True)
class MLflowFacts:
    """The facts of one run. parent_id: the run of its pipeline, if it has one; a trial's parent is none."""

    client: MlflowClient
    runs: ExperimentRuns
    run_id: str
    parent_id: str | None
    run_name: str

    @property
    def _models(self) -> ExportModels:
        return ExportModels(self.client, self.runs.experiment, self.run_id, self.run_name)

    def is_own_store(self, note: Mapping[str, Any]) -> bool:
        return self.runs.is_own(note)

    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        """Log data sets; MLflow keeps one of a name and digest, and one link of it to a run."""
        inputs = [MLflowDatasetInput(_to_dataset(data), _dataset_tags(data)) for data in datasets]
        stored = self.client.get_run(self.run_id).inputs
        present = {(entry.dataset.name, entry.dataset.digest) for entry in (stored.dataset_inputs if stored else ())}
        missing = [entry for entry in inputs if (entry.dataset.name, entry.dataset.digest) not in present]
        if missing:
            self.client.log_inputs(self.run_id, missing)

    def log_input_models(self, linked: Mapping[str, str], unlinked: Sequence[ModelInput]) -> None:
        """Link the models that the store has; the others become tags, ``input.teacher.path`` and ``.sha256``."""
        tags = {f"input.{model.role}.path": redact(model.path) for model in unlinked}
        tags |= {f"input.{model.role}.sha256": model.sha256 for model in unlinked}
        self._set_tags(self.run_id, tags | {f"input.{role}.model_id": model_id for role, model_id in linked.items()})
        stored = self.client.get_run(self.run_id).inputs
        present = {entry.model_id for entry in ((stored.model_inputs if stored else None) or ())}
        missing = [LoggedModelInput(model_id) for model_id in sorted(set(linked.values()) - present)]
        if missing:
            self.client.log_inputs(self.run_id, models=missing)

    def describe(self, stage: str, tags: Mapping[str, str], description: str) -> None:
        """Set MLflow's standard tags; a description that a user has changed or removed is left alone."""
        standard = {_TAGS[name]: value for name, value in tags.items() if name in _TAGS}
        if stage:
            standard |= {"stage": stage, MLFLOW_SOURCE_NAME: f"foveal train {stage}"}
            standard[MLFLOW_SOURCE_TYPE] = "JOB" if any(name.startswith("slurm.") for name in tags) else "LOCAL"
        self._set_tags(self.run_id, standard)
        self._set_description(self.run_id, description)

    def update_pipeline(self, results: Mapping[str, float], at: tuple[int, int]) -> None:
        """Set state, end and results of the pipeline's run, from its stages as the store has them at that moment.

        Stages may end at once: each sets its own state before it asks, and asks again after it has set the pipeline's,
        so the last one to ask has seen all.
        """
        if self.parent_id is None:
            return
        stage_name = self.run_name.partition("/")[2] or self.run_name
        time, step = at
        points = [
            Metric(name_stage_result(stage_name, name), value, time, step)
            for name, value in list(main_results(results).items())[:_MAX_STAGE_RESULTS]
        ]
        parent = self.client.get_run(self.parent_id)
        if missing := [point for point in points if parent.data.metrics.get(point.key) != point.value]:
            self.client.log_batch(self.parent_id, metrics=missing, synchronous=True)
        # The stages of a pipeline may have settings of their own, and with them another experiment.
        own = self.client.get_run(self.run_id).info.experiment_id
        experiments = sorted({self.runs.experiment, own, parent.info.experiment_id})
        for _ in range(3):
            if not (stages := self._list_stages(experiments)):
                return
            status = combine_statuses(stages)
            ends = [run.info.end_time or 0 for run in stages]
            set_status(
                self.client, self.parent_id, status, None if status == "RUNNING" else max(ends, default=0) or None
            )
            if combine_statuses(self._list_stages(experiments)) == status:
                break
        self._set_description(self.parent_id, _describe_pipeline(stages))

    def find_or_create_model(self, export: Export) -> str:
        return self._models.find_or_create(export)

    def complete_model(
        self, model_id: str, export: Export, points: Sequence[MetricPoint], data: RunInputs | None
    ) -> None:
        evaluated = [_to_dataset(entry) for entry in (data.datasets if data else ()) if entry.role == "evaluation"]
        self._models.complete(model_id, export, points, evaluated[0] if len(evaluated) == 1 else None)

    def mark_replaced(self, model_id: str, by: str) -> None:
        self._models.mark_replaced(model_id, by)

    def upload_weights(self, model_id: str, export: Export) -> None:
        """Upload all files of an export. A server that passes artifacts on answers after the last byte of a file."""
        timeout = MLFLOW_HTTP_REQUEST_TIMEOUT.get_raw()
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(_UPLOAD_SECONDS, MLFLOW_HTTP_REQUEST_TIMEOUT.get()))
        try:
            self.client.log_model_artifacts(model_id, str(export.folder))
        finally:
            if timeout is None:
                MLFLOW_HTTP_REQUEST_TIMEOUT.unset()
            else:
                MLFLOW_HTTP_REQUEST_TIMEOUT.set(timeout)

    def register_model(self, model_id: str, export: Export, name: str, alias: str | None) -> None:
        self._models.register(model_id, export, name, alias)

    def _list_stages(self, experiments: list[str]) -> list[Run]:
        assert self.parent_id is not None
        found = self.client.search_runs(
            experiments, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'", max_results=1000
        )
        return list(found)

    def _set_description(self, run_id: str, description: str) -> None:
        stored = self.client.get_run(run_id).data.tags
        digest, current = _digest(description), stored.get(MLFLOW_RUN_NOTE)
        is_ours = stored.get(_DESCRIBED_TAG) == (None if current is None else _digest(current))
        if is_ours and current != description:
            # In one request, so that no other description is taken for that of a user.
            self._set_tags(run_id, {MLFLOW_RUN_NOTE: description, _DESCRIBED_TAG: digest})

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        stored = self.client.get_run(run_id).data.tags
        changed = [RunTag(name, redact(value)) for name, value in tags.items() if stored.get(name) != redact(value)]
        if changed:
            self.client.log_batch(run_id, tags=changed, synchronous=True)


def _to_dataset(data: DatasetInput) -> Dataset:
    """Return a split of a data set as MLflow has it: by name, and a digest of at most 36 characters."""
    profile = {"num_images": data.num_images, "num_classes": data.num_classes, "sha256": data.digest}
    scheme, separator, _ = data.path.partition("://")
    source_type = scheme if separator else "local"
    key = "url" if scheme in ("http", "https") and separator else "uri"
    return Dataset(
        f"{data.name} {data.split}",
        data.digest[:_MAX_DIGEST],
        source_type,
        json.dumps({key: redact(data.path)[:_MAX_SOURCE]}),
        profile=json.dumps(profile),
    )


def _dataset_tags(data: DatasetInput) -> list[InputTag]:
    tags = {MLFLOW_DATASET_CONTEXT: data.role, "foveal.split": data.split, "foveal.num_used": str(data.num_used)}
    return [InputTag(name, value[:_MAX_TAG]) for name, value in tags.items()]


def _describe_pipeline(stages: Sequence[Run]) -> str:
    lines = ["| stage | state |", "| --- | --- |"]
    for run in sorted(stages, key=lambda run: run.info.start_time):
        name = (run.info.run_name or run.info.run_id).partition("/")[2] or run.info.run_name
        lines.append(f"| {name} | {run.data.tags.get('state', run.info.status.lower())} |".replace("<", "&lt;"))
    return "\n".join(lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
