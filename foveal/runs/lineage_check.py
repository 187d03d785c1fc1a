"""Digests of a lineage, computed again from the files that are still there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.atomic import sha256
from foveal.data.format.manifest import Manifest, read_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, mmap_index
from foveal.errors import FovealError
from foveal.runs.inputs import DatasetInput
from foveal.runs.lineage import FOREIGN_STAGE, has_checkpoint
from foveal.runs.lineage_node import LineageNode

Verdict = Literal["agrees", "differs", "gone", "not checked"]
_WEIGHTS = "model.safetensors"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class DigestCheck:
    """What was found where a lineage says that a model or data set is. digest: the recorded one. reason: of any other verdict than ``agrees``."""

    path: str
    digest: str
    verdict: Verdict
    reason: str = ""


def check_lineage(root: LineageNode) -> list[DigestCheck]:
    """Compute every digest of a lineage whose file is there, each once."""
    checks: dict[tuple[str, str], DigestCheck] = {}
    for node in root.walk():
        for model in (node, *node.exports):
            key = (model.path, model.sha256)
            if model.sha256 and key not in checks:
                checks[key] = DigestCheck(*key, *_check_model(model))
        for dataset in node.datasets:
            key = (dataset.path, dataset.digest)
            if key not in checks:
                checks[key] = DigestCheck(*key, *_check_dataset(dataset))
    return list(checks.values())


def _find_obstacle(path: str) -> tuple[Verdict, str] | None:
    """Return why there is nothing to check at a path; None if there is something."""
    if not path:
        return "not checked", "where it was is not recorded"
    if "://" in path:
        return "not checked", "behind a URL"
    try:
        is_there = Path(path).exists()
    except OSError as error:  # a folder of somebody else
        return "not checked", f"cannot be read ({error.strerror})"
    return None if is_there else ("gone", "not there any more")


def _check_model(node: LineageNode) -> tuple[Verdict, str]:
    path = Path(node.path)
    if obstacle := _find_obstacle(node.path):
        return obstacle
    if node.role == "fork":
        is_there = has_checkpoint(path, node.step or 0, node.sha256)
        return ("agrees", "") if is_there else ("gone", f"the run has its checkpoint of step {node.step} no more")
    try:
        files = _list_foreign(path) if node.stage == FOREIGN_STAGE else [path / _WEIGHTS]
        is_same = any(sha256(file) == node.sha256 for file in files)
    except FileNotFoundError:
        return "gone", f"it has no {_WEIGHTS} any more"
    except OSError as error:
        return "not checked", f"cannot be read ({error.strerror})"
    if is_same or len(files) == 1:
        return ("agrees", "") if is_same else ("differs", "the weights are others")
    return "not checked", f"{len(files)} files of weights, none of which has the digest alone"


def _list_foreign(path: Path) -> list[Path]:
    """Return the files of weights of others: the path itself, or those in the folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)


def _check_dataset(dataset: DatasetInput) -> tuple[Verdict, str]:
    folder = Path(dataset.path)
    if obstacle := _find_obstacle(dataset.path):
        return obstacle
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return "not checked", "no manifest.json there; with data.index it is elsewhere"
    except (FovealError, OSError) as error:
        return "differs", str(error)
    entry = manifest.splits.get(dataset.split)
    if entry is None or entry.samples_digest != dataset.digest:
        return "differs", f"the samples of split '{dataset.split}' are others"
    damage = next(_iter_damaged_indices(folder, manifest, dataset.split), "")
    return ("differs" if damage else "agrees"), damage


def _iter_damaged_indices(folder: Path, manifest: Manifest, split: str) -> Iterator[str]:
    for shard in manifest.splits[split].shards:
        file = folder / f"{shard.file}{INDEX_SUFFIX}"
        try:
            index, _ = mmap_index(file)
            if index.compute_samples_digest() != shard.index:
                yield f"{file} is not the index that manifest.json was written with"
        except (FovealError, OSError) as error:
            yield str(error)
