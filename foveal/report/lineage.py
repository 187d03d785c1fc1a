"""The lineage of a run as nested lists of texts: what it was made from, back to the data."""

import os
from dataclasses import dataclass
from pathlib import Path

from foveal.redact import redact
from foveal.runs.inputs import DatasetInput
from foveal.runs.lineage import FOREIGN_STAGE
from foveal.runs.lineage_node import LineageNode


@dataclass(frozen=True)
class LineageItem:
    """A data set, a model or a sentence of a page: what it is, facts about it, and what it was made from."""

    title: str
    facts: str = ""
    children: tuple["LineageItem", ...] = ()


def describe_lineage(root: LineageNode, page: Path) -> tuple[LineageItem, ...]:
    """Return what a run was made from; paths are relative to the page where it is near them."""
    return _describe_sources(root, page, root.datasets)


def _describe_sources(node: LineageNode, page: Path, datasets: tuple[DatasetInput, ...]) -> tuple[LineageItem, ...]:
    models = tuple(_describe_model(model, page) for model in node.models)
    return models + tuple(_describe_dataset(dataset) for dataset in datasets)


def shorten_path(path: str, page: Path) -> str:
    """Return a path from the folder of a page if it is at most three folders up, else as it is; without secrets."""
    if not path.startswith("/"):
        return redact(path)
    relative = os.path.relpath(path, page.resolve().parent)
    return redact(path if relative.startswith("../../../..") else relative)


def _describe_model(node: LineageNode, page: Path) -> LineageItem:
    step = f"step {node.step:,}" if node.step else ""
    digest = f"sha256 {node.sha256[:12]}" if node.sha256 else ""
    again = "as above" if node.is_repeated else ""
    facts = " · ".join(filter(None, [node.stage, step, shorten_path(node.path, page), digest, again]))
    # What a teacher was evaluated on is not what it was made from.
    training = tuple(dataset for dataset in node.datasets if dataset.role == "training")
    gaps = ["weights of others"] if node.stage == FOREIGN_STAGE else [redact(gap) for gap in node.gaps]
    return LineageItem(node.role, facts, (*map(LineageItem, gaps), *_describe_sources(node, page, training)))


def _describe_dataset(dataset: DatasetInput) -> LineageItem:
    used = f"{dataset.num_used:,} of {dataset.num_images:,} images"
    if dataset.num_used == dataset.num_images:
        used = f"{dataset.num_images:,} images"
    facts = " · ".join([dataset.split, used, f"digest {dataset.digest[:12]}"])
    return LineageItem(f"{dataset.role} data: {dataset.name}", facts)
