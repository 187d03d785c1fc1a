"""The facts of a run that a store in memory has, once each, and what happens to a request before it is carried out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.atomic import write_json
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, write_inputs
from foveal.tracking.exported import Export
from foveal.tracking.tracker import MetricPoint


class KeptFacts:
    """A ``RemoteFacts``. ``calls`` are the requests in their order."""

    def __init__(self, run_id: str = "1", store: str = "here") -> None:
        self.run_id, self.store = run_id, store
        self.calls: list[str] = []
        self.datasets: list[DatasetInput] = []
        self.linked: dict[str, str] = {}
        self.unlinked: list[str] = []
        self.description = self.stage = ""
        self.pipeline: dict[str, float] = {}
        self.models: dict[str, str] = {}  # identity to id
        self.points: dict[str, list[MetricPoint]] = {}
        self.replaced: dict[str, str] = {}
        self.weights: list[str] = []
        self.versions: dict[str, tuple[str, str | None]] = {}
        self.before: Callable[[str], object] = lambda _: None

    def is_own_store(self, note: Mapping[str, Any]) -> bool:
        return note.get("store") == self.store

    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        self._call("datasets")
        self.datasets += [data for data in datasets if data not in self.datasets]

    def log_input_models(self, linked: Mapping[str, str], unlinked: Sequence[ModelInput]) -> None:
        self._call("input models")
        self.linked |= linked
        self.unlinked = [model.role for model in unlinked]

    def describe(self, stage: str, tags: Mapping[str, str], description: str) -> None:
        self._call("description")
        self.stage, self.description = stage, description

    def update_pipeline(self, results: Mapping[str, float], at: tuple[int, int]) -> None:
        self._call("pipeline")
        self.pipeline |= results

    def find_or_create_model(self, export: Export) -> str:
        self._call("create")
        return self.models.setdefault(export.identity, f"m-{len(self.models) + 1}")

    def complete_model(
        self, model_id: str, export: Export, points: Sequence[MetricPoint], data: RunInputs | None
    ) -> None:
        self._call("complete")
        self.points[model_id] = list(points)

    def mark_replaced(self, model_id: str, by: str) -> None:
        self._call("replace")
        self.replaced[model_id] = by

    def upload_weights(self, model_id: str, export: Export) -> None:
        self._call("weights")
        self.weights.append(model_id)

    def register_model(self, model_id: str, export: Export, name: str, alias: str | None) -> None:
        self._call("register")
        self.versions[f"{name} {export.identity}"] = (model_id, alias)

    def _call(self, verb: str) -> None:
        self.calls.append(verb)
        self.before(verb)


def dataset(role: str = "training", split: str = "train", digest: str = "d" * 64) -> DatasetInput:
    return DatasetInput(role, "digits", "data/digits", split, digest, 1437, 20, 10)  # type: ignore[arg-type]


def write_export(
    run: Path, sha256: str = "a" * 64, step: int = 4, name: str = "export", head_sha256: str = "", **metrics: float
) -> Path:
    """Write the card of an export, its model card and its weights."""
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {"name": "vit_tiny_patch16_224", "width": 96}
    card = {"stage": "pretrain", "step": step, "sha256": sha256, "metrics": metrics, "encoder": encoder}
    write_json(folder / "card.json", card | ({"head_sha256": head_sha256} if head_sha256 else {}))
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n\n# An encoder\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def write_run_inputs(run: Path, *models: ModelInput, stage: str = "pretrain") -> RunInputs:
    datasets = (dataset(), dataset("evaluation", "val", "e" * 64))
    inputs = RunInputs(str(run.resolve()), stage, datasets, models)
    run.mkdir(parents=True, exist_ok=True)
    write_inputs(run, inputs)
    return inputs
