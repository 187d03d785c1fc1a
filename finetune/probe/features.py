"""Features of a frozen encoder: computed once by all ranks, kept in the run directory whole or not at all.

``features/<part>-pooled.npy`` is float32 [S, N, F] and ``features/<part>-patches.npy`` float16 [S, N, L, D] (S layers, N
images of the part in the order of the split); ``<part>-labels.npy`` is int64 [N], -1 where there is nothing to learn or
to count. A rank writes the rows of its own images into the one file, so the files are the same on any number of ranks.
All is written into a draft, which gets its name when every rank has forced its rows to disk.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.model import classifier_from_plan
from finetune.probe.plan import FileShapes, ProbePlan
from foveal.atomic import publish_draft, write_json
from foveal.data import Batch, normalise
from foveal.engines.base import autocast
from foveal.errors import CheckpointError, DataError, ExportError
from foveal.models.backbone import forward_pooled
from foveal.models.probes import encode_probe_features
from foveal.models.resize import resize_weights_from_card
from foveal.models.vit import encoder_from_card
from foveal.seeding import derive_key
from foveal.training.run import Run
from foveal.weights.export import load_weights_strict

FeatureExtractor = Callable[
    [Tensor], tuple[Tensor, Tensor | None]
]  # images to (features [S, B, F], patches [S, B, L, D])
FEATURES_DIR = "features"
PROVENANCE_FILE = "facts.json"
_FORMAT = 1
_SCIENCE = ("data.", "inherited.", "model", "backbone", "pooling", "probe.layers", "probe.features", "seed")


@dataclass(frozen=True)
class LayerFeatures:
    """One layer of the kept features of a part of the data, without the images that have no label."""

    memmap: np.ndarray  # [N, ...], on disk
    labelled_indices: np.ndarray  # int64 [M]: the rows that have a label
    labels: Tensor  # int64 [M], on the device

    def __len__(self) -> int:
        return len(self.labelled_indices)

    def load(self, positions: np.ndarray | slice) -> Tensor:
        """The features of some of the M images, float32 on the device."""
        chosen = torch.from_numpy(self.memmap[self.labelled_indices[positions]])
        return chosen.to(self.labels.device).float()


def feature_provenance(plan: ProbePlan) -> dict[str, Any]:
    """All that the features depend on, as plain data: the export's sha256 and the data's digests are among it."""
    science = {name: value for name, value in plan.science_settings().items() if name.startswith(_SCIENCE)}
    shapes = {name: [list(shape), np.dtype(kind).name] for name, (shape, kind) in plan.file_shapes.items()}
    precision = plan.cfg.engine.precision
    return json.loads(json.dumps({"format": _FORMAT, "files": shapes, "precision": precision, "science": science}))


def has_cached_features(plan: ProbePlan, run_dir: Path) -> bool:
    """Whether the features are there. Raises: CheckpointError where they are of something else."""
    folder = run_dir / FEATURES_DIR
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / PROVENANCE_FILE).read_text())
    except (OSError, ValueError):
        found = {}
    told = feature_provenance(plan)
    other = [name for name in told if found.get(name) != told[name]]
    other = [f"{each} of {name}" for name in other for each in _differing_keys(found.get(name), told[name])] or other
    if other:
        raise CheckpointError(
            f"{folder} holds features of another kind (differing: {', '.join(other[:5])}): remove that folder, or set "
            f"run.fresh=true"
        )
    return True


def _differing_keys(found: Any, told: Any) -> list[str]:
    if not isinstance(found, dict) or not isinstance(told, dict):
        return []
    return sorted(name for name in found | told if found.get(name) != told.get(name))


def extract_features(plan: ProbePlan, run: Run) -> bool:
    """Compute and keep the features of all parts; false if the run was asked to leave. Every rank calls it.

    Raises: DataError, CheckpointError where there is no room.
    """
    draft = run.path / f".draft-{FEATURES_DIR}-{run.attempt.number}"  # a superseded attempt writes into no other's
    run.world.on_rank0(lambda: _create_draft(plan, run.path, draft))
    _, look = build_feature_extractor(plan, run.world.device)
    for name, (split, part) in plan.subsets.items():
        files = _FeatureWriter(draft, name, plan.file_shapes)
        with closing(files), closing(run.evaluation_batches(0, split=split, subset=part)) as batches:
            for batch in batches:
                place = (batch.microbatch_index * run.world.size + run.world.rank) * plan.cfg.batch.at_once
                run.world.run_all_or_raise(
                    partial(_extract_batch, plan, look, files, place, batch.to(run.world.device))
                )
                if run.check_preemption():
                    return False
            run.world.run_all_or_raise(files.fsync)
    run.world.on_rank0(lambda: publish_draft(draft, run.path / FEATURES_DIR))
    return True


def _extract_batch(
    plan: ProbePlan, extractor: FeatureExtractor, writer: "_FeatureWriter", first: int, batch: Batch
) -> None:
    writer.write(first, _compute_columns(plan, extractor, batch.images) | {"labels": batch.labels.cpu()})


def _create_draft(plan: ProbePlan, run_dir: Path, draft: Path) -> None:
    """An empty draft with room for every row; those of attempts that were killed are gone. Raises: CheckpointError."""
    for old in run_dir.glob(f".draft-{FEATURES_DIR}-*"):
        shutil.rmtree(old)
    try:
        draft.mkdir()
        for name, (shape, kind) in plan.file_shapes.items():
            np.lib.format.open_memmap(draft / name, mode="w+", dtype=kind, shape=shape)
        write_json(draft / PROVENANCE_FILE, feature_provenance(plan))
    except OSError as error:
        raise _disk_shortage_error(draft, error) from None


def _disk_shortage_error(where: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{where} cannot keep the features ({error.strerror}): make room, or set run.dir to another disk"
    )


def build_feature_extractor(plan: ProbePlan, device: torch.device) -> tuple[nn.Module, FeatureExtractor]:
    """The frozen model, and how it is looked at."""
    cfg, probe = plan.cfg, plan.probe
    if plan.backbone:
        backbone = classifier_from_plan(plan).encoder.to(device).eval()
        return backbone, lambda images: (forward_pooled(backbone, images)[0][None], None)
    encoder = load_frozen_encoder(plan).to(device).eval()
    features = probe.features or cfg.pooling
    return encoder, lambda images: encode_probe_features(encoder, images, plan.layers, features)


def load_frozen_encoder(plan: ProbePlan) -> Any:
    """The encoder with all that it was exported with but its head: its own norm, before or behind the pooling.

    Without an export, one that is freshly drawn: random features are a baseline.
    """
    cfg = plan.cfg
    torch.manual_seed(derive_key(cfg.seed, "weights"))
    if plan.init_source is None:
        return encoder_from_card(plan.encoder, "model", pooling="token", num_classes=0)
    place, card = plan.init_source.path, plan.init_source.card
    size = {"image_size": cfg.data.to_dict()["image_size"]}
    encoder = encoder_from_card(card.encoder | size, f"{place}/card.json", num_classes=0)
    weights = resize_weights_from_card(plan.init_source.load_weights(), encoder, card.encoder, f"{place}/card.json")
    load_weights_strict(encoder, weights, place, unused_prefixes=("head.",))
    return encoder


@torch.no_grad()
def _compute_columns(plan: ProbePlan, extractor: FeatureExtractor, images: Tensor) -> dict[str, Tensor]:
    """What goes into each kind of file, on the CPU, of images uint8 [B, C, H, W]. Raises: DataError if it is not finite."""
    probe = plan.probe
    with autocast(images.device, plan.cfg.engine.precision):
        pooled, patches = extractor(normalise(images, plan.mean, plan.std))
    found = {"pooled": pooled.float().cpu()} if probe.reads_pooled else {}
    if probe.reads_patches:
        assert patches is not None, "the plan refuses attentive probes of a model of timm"
        found["patches"] = (
            patches.half().cpu()
        )  # behind a norm numbers are small, and float16 has 3 bits more than bf16
    if not all(bool(each.isfinite().all()) for each in found.values()):
        raise ExportError(
            f"{plan.cfg.init or 'the model'} gives features that are not finite: nothing can be learned on them"
        )
    return found


class _FeatureWriter:
    """The open files of a part, which several ranks write at once: each its own rows, never a page of another's."""

    def __init__(self, draft: Path, subset: str, shapes: FileShapes) -> None:
        self._draft = draft
        self._files: dict[str, tuple[np.memmap, int]] = {}
        for name in shapes:
            of, _, column = name.removesuffix(".npy").partition("-")
            if of == subset:
                header = np.load(draft / name, mmap_mode="r")
                self._files[column] = header, os.open(draft / name, os.O_WRONLY)

    def write(self, first_row: int, columns: dict[str, Tensor]) -> None:
        """Put rows [S, B, ...], or [B] for labels, where the part's image ``first`` is; what is past its end fills up.

        Raises: CheckpointError where there is no room.
        """
        for column, values in columns.items():
            header, file = self._files[column]
            layers = values.numpy()[None] if header.ndim == 1 else values.numpy()
            images = header.shape[-1] if header.ndim == 1 else header.shape[1]
            size = header.nbytes // max(1, len(layers) * images)
            for layer, rows in enumerate(layers):
                wanted = np.ascontiguousarray(rows[: max(0, images - first_row)])
                self._pwrite_all(
                    file,
                    wanted.data.cast("B") if wanted.size else b"",
                    header.offset + (layer * images + first_row) * size,
                )

    def _pwrite_all(self, file: int, content: memoryview | bytes, offset: int) -> None:
        try:
            while content:
                written = os.pwrite(file, content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise _disk_shortage_error(self._draft, error) from None

    def fsync(self) -> None:
        """All rows of this rank are on disk. Raises: CheckpointError."""
        for _, file in self._files.values():
            try:
                os.fsync(file)
            except OSError as error:
                raise _disk_shortage_error(self._draft, error) from None

    def close(self) -> None:
        """The files are closed."""
        for _, file in self._files.values():
            os.close(file)


def load_features(run_dir: Path, subset: str, layer_index: int, column: str, device: torch.device) -> LayerFeatures:
    """The kept features of a part: the ``layer``-th of those that are read, ``column`` is pooled or patches.

    Raises: DataError where no image of the part has a label.
    """
    folder = run_dir / FEATURES_DIR
    labels = np.load(folder / f"{subset}-labels.npy")
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise DataError(f"{folder}: no image of the part '{subset}' has a label that can be read")
    rows = np.load(folder / f"{subset}-{column}.npy", mmap_mode="r")[layer_index]
    return LayerFeatures(rows, known, torch.from_numpy(labels[known]).to(device))
