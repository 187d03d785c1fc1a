"""The lineage of a run as nested lists: what it was made from, back to the data."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from foveal.redact import redact
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs

_MAX_DEPTH = 20  # of models that were made from models


@dataclass(frozen=True)
class LineageNode:
    """A data set or a model: what it is, facts about it, and what it was made from."""

    title: str
    facts: str
    children: tuple["LineageNode", ...] = field(default_factory=tuple)


def describe_lineage(inputs: RunInputs, page: Path) -> tuple[LineageNode, ...]:
    """Return the inputs of a run as nodes; paths are relative to the page where it is near them.

    A model that several descend from has its own inputs where it comes first only.
    """
    return _describe_inputs(inputs, page, 0, set())


def _describe_inputs(inputs: RunInputs, page: Path, depth: int, shown: set[tuple[str, str]]) -> tuple[LineageNode, ...]:
    if depth >= _MAX_DEPTH:
        return (LineageNode("...", ""),)
    models = tuple(_describe_model(model, page, depth, shown) for model in inputs.models)
    # What a teacher was evaluated on is not what it was made from.
    datasets = [dataset for dataset in inputs.datasets if dataset.role == "training" or depth == 0]
    return models + tuple(_describe_dataset(dataset) for dataset in datasets)


def shorten_path(path: str, page: Path) -> str:
    """Return a path from the folder of a page if it is at most three folders up, else as it is; without secrets."""
    if not path.startswith("/"):
        return redact(path)
    relative = os.path.relpath(path, page.resolve().parent)
    return redact(path if relative.startswith("../../../..") else relative)


def _describe_model(model: ModelInput, page: Path, depth: int, shown: set[tuple[str, str]]) -> LineageNode:
    step = f"step {model.step:,}" if model.step else ""
    digest = f"sha256 {model.sha256[:12]}" if model.sha256 else ""
    facts = " · ".join(filter(None, [model.stage, step, shorten_path(model.path, page), digest]))
    if model.inputs is None:
        origin = "weights of others" if model.stage == "foreign" else "what it was made from is not recorded"
        return LineageNode(model.role, facts, (LineageNode(origin, ""),))
    if (model.path, model.sha256) in shown:
        return LineageNode(model.role, f"{facts} · as above")
    shown.add((model.path, model.sha256))
    return LineageNode(model.role, facts, _describe_inputs(model.inputs, page, depth + 1, shown))


def _describe_dataset(dataset: DatasetInput) -> LineageNode:
    used = f"{dataset.num_used:,} of {dataset.num_images:,} images"
    if dataset.num_used == dataset.num_images:
        used = f"{dataset.num_images:,} images"
    facts = " · ".join([dataset.split, used, f"digest {dataset.digest[:12]}"])
    return LineageNode(f"{dataset.role} data: {dataset.name}", facts)
