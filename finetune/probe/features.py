"""Cache of a frozen encoder's features: computed once by all ranks and published atomically in the run directory.

``features/<subset>-pooled.npy`` is float32 [S, N, F] and ``features/<subset>-patches.npy`` float16 [S, N, L, D] (S
layers, N images of the subset in the order of the split); ``<subset>-labels.npy`` is int64 [N], -1 for an image without
a label. All ranks write the rows of their images into the same file, so that the files do not depend on the number of
ranks. The files are written to a draft folder, which is renamed once every rank has synced its rows to disk.
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
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.distributed.preemption import LeaveRequest
from foveal.engines.attention import apply_attention
from foveal.engines.base import autocast
from foveal.errors import CheckpointError, DataError, ExportError
from foveal.models.backbone import forward_pooled
from foveal.models.probes import encode_probe_features
from foveal.models.resize import resize_positions_from_card
from foveal.models.vit import encoder_from_card
from foveal.renames import restore_names
from foveal.seeding import derive_key
from foveal.training.run import Run
from foveal.weights.export import load_weights_strict

# Maps images to (pooled features [S, B, F], patch tokens [S, B, L, D]).
FeatureExtractor = Callable[[Tensor], tuple[Tensor, Tensor | None]]
FEATURES_DIR = "features"
PROVENANCE_FILE = "facts.json"
_FORMAT = 1
_SCIENCE = ("data.", "inherited.", "model", "backbone", "pooling", "probe.layers", "probe.features", "seed")


@dataclass(frozen=True)
class LayerFeatures:
    """Cached features of one layer and data subset, restricted to labelled images."""

    all_images_memmap: np.ndarray  # [N, ...], on disk
    labelled_indices: np.ndarray  # int64 [M]: rows of images with a label
    labels: Tensor  # int64 [M], on the device

    def __len__(self) -> int:
        return len(self.labelled_indices)

    def load(self, labelled_positions: np.ndarray | slice) -> Tensor:
        """Return the features at these positions among the M images, float32 on the device."""
        rows = torch.from_numpy(self.all_images_memmap[self.labelled_indices[labelled_positions]])
        return rows.to(self.labels.device).float()


def feature_provenance(plan: ProbePlan) -> dict[str, Any]:
    """Return everything that the features depend on, as JSON data, including the digests of export and data."""
    # Features that earlier versions have cached stay in use.
    science = restore_names(plan.cfg.without_neutral(plan.science_settings()))
    science = {name: value for name, value in science.items() if name.startswith(_SCIENCE)}
    shapes = {name: [list(shape), np.dtype(dtype).name] for name, (shape, dtype) in plan.file_shapes.items()}
    precision, tokens = str(plan.cfg.engine.precision), plan.cfg.engine.max_explicit_attention_tokens
    if tokens not in (0, "auto"):  # probes decide nothing for auto, so features that were cached before stay in use
        precision += f", explicit attention up to {tokens} tokens"
    return json.loads(json.dumps({"format": _FORMAT, "files": shapes, "precision": precision, "science": science}))


def check_cached_features(plan: ProbePlan, run_dir: Path) -> bool:
    """Return whether the features are cached. Raises: CheckpointError if cached features have another provenance."""
    folder = run_dir / FEATURES_DIR
    if not folder.exists():
        return False
    try:
        cached = json.loads((folder / PROVENANCE_FILE).read_text())
    except (OSError, ValueError):
        cached = {}
    expected = feature_provenance(plan)
    differing = [name for name in expected if cached.get(name) != expected[name]]
    details = [f"{key} of {name}" for name in differing for key in _differing_keys(cached.get(name), expected[name])]
    differing = details or differing
    if differing:
        raise CheckpointError(
            f"{folder} holds features of another kind (differing: {', '.join(differing[:5])}): remove that folder, or "
            f"set run.fresh=true"
        )
    return True


def _differing_keys(cached: Any, expected: Any) -> list[str]:
    """Return the keys whose values differ; empty if either side is no dict."""
    if not isinstance(cached, dict) or not isinstance(expected, dict):
        return []
    return sorted(name for name in cached | expected if cached.get(name) != expected.get(name))


def extract_and_cache_features(plan: ProbePlan, run: Run) -> LeaveRequest | None:
    """Compute and cache the features of all subsets; return the request to leave that stopped it. Every rank calls it.

    Raises: DataError, CheckpointError if the disk is full.
    """
    # A superseded attempt that is still alive writes to its own draft.
    draft = run.path / f".draft-{FEATURES_DIR}-{run.attempt.number}"
    run.world.on_rank0(lambda: _create_draft(plan, run.path, draft))
    _, extractor = build_feature_extractor(plan, run.world.device)
    for name, (split, subset) in plan.subsets.items():
        writer = _FeatureWriter(draft, name, plan.file_shapes)
        with (
            closing(writer),
            closing(run.evaluation_batches(0, split=split, subset=subset, purpose="extracting features")) as batches,
        ):
            for batch in batches:
                first_row = (batch.microbatch_index * run.world.size + run.world.rank) * plan.cfg.batch.max_micro_size
                run.world.run_all_or_raise(
                    partial(_extract_batch, plan, extractor, writer, first_row, batch.to(run.world.device))
                )
                if leave := run.check_preemption():
                    return leave
            run.world.run_all_or_raise(writer.fsync)
    run.world.on_rank0(lambda: publish_draft(draft, run.path / FEATURES_DIR))
    return None


def _extract_batch(
    plan: ProbePlan, extractor: FeatureExtractor, writer: "_FeatureWriter", first_row: int, batch: Batch
) -> None:
    writer.write(first_row, _compute_columns(plan, extractor, batch.images) | {"labels": batch.labels.cpu()})


def _create_draft(plan: ProbePlan, run_dir: Path, draft: Path) -> None:
    """Create a draft with files of their final size, and remove drafts of killed attempts. Raises: CheckpointError."""
    for old_draft in run_dir.glob(f".draft-{FEATURES_DIR}-*"):
        shutil.rmtree(old_draft)
    try:
        draft.mkdir()
        for name, (shape, dtype) in plan.file_shapes.items():
            np.lib.format.open_memmap(draft / name, mode="w+", dtype=dtype, shape=shape)
        write_json(draft / PROVENANCE_FILE, feature_provenance(plan))
    except OSError as error:
        raise _disk_shortage_error(draft, error) from None


def _disk_shortage_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot keep the features ({error.strerror}): make room, or set run.dir to another disk"
    )


def build_feature_extractor(plan: ProbePlan, device: torch.device) -> tuple[nn.Module, FeatureExtractor]:
    """Return the frozen model in evaluation mode on the device, and the function that extracts its features."""
    cfg, probe = plan.cfg, plan.probe
    if plan.backbone:
        backbone = classifier_from_plan(plan).encoder.to(device).eval()
        return backbone, lambda images: (forward_pooled(backbone, images)[0][None], None)
    encoder = build_probed_encoder(plan).to(device).eval()
    apply_attention(encoder, cfg.engine)
    features = probe.features or cfg.pooling
    return encoder, lambda images: encode_probe_features(encoder, images, plan.layers, features)


def build_probed_encoder(plan: ProbePlan) -> Any:
    """Return the exported encoder without its head, with its own norm before or after the pooling.

    Without an export the encoder is randomly initialized: random features are a baseline.
    """
    cfg = plan.cfg
    torch.manual_seed(derive_key(cfg.seed, "weights"))
    if plan.init_source is None:
        return encoder_from_card(plan.encoder, "model", pooling="token", num_classes=0)
    path, card = plan.init_source.path, plan.init_source.card
    size = {"image_size": cfg.data.to_dict()["image_size"]}
    encoder = encoder_from_card(card.encoder | size, f"{path}/card.json", num_classes=0)
    weights = resize_positions_from_card(plan.init_source.load_weights(), encoder, card.encoder, f"{path}/card.json")
    load_weights_strict(encoder, weights, path, unused_prefixes=("head.",))
    return encoder


@torch.no_grad()
def _compute_columns(plan: ProbePlan, extractor: FeatureExtractor, images: Tensor) -> dict[str, Tensor]:
    """Return the file contents on the CPU by column, of images uint8 [B, C, H, W].

    Raises: ExportError if a feature is not finite.
    """
    probe = plan.probe
    with autocast(images.device, plan.cfg.engine.precision):
        pooled, patches = extractor(normalise(images, plan.mean, plan.std))
    columns = {"pooled": pooled.float().cpu()} if probe.reads_pooled else {}
    if probe.reads_patches:
        assert patches is not None, "the plan refuses attentive probes of a timm model"
        # Normalized tokens are small, so that float16 suffices; it has 3 mantissa bits more than bfloat16.
        columns["patches"] = patches.half().cpu()
    if not all(bool(values.isfinite().all()) for values in columns.values()):
        raise ExportError(
            f"{plan.cfg.init or 'the model'} gives features that are not finite: nothing can be learned on them"
        )
    return columns


class _FeatureWriter:
    """Open files of a subset. Ranks write concurrently, by ``pwrite`` of their own rows, never by mapped pages."""

    def __init__(self, draft: Path, subset: str, shapes: FileShapes) -> None:
        self._draft = draft
        self._files: dict[str, tuple[np.memmap, int]] = {}
        for name in shapes:
            file_subset, _, column = name.removesuffix(".npy").partition("-")
            if file_subset == subset:
                header = np.load(draft / name, mmap_mode="r")
                self._files[column] = header, os.open(draft / name, os.O_WRONLY)

    def write(self, first_row: int, columns: dict[str, Tensor]) -> None:
        """Write rows [S, B, ...], or [B] for labels, from image ``first_row`` on; rows past the end are padding.

        Raises: CheckpointError if the disk is full.
        """
        for column, values in columns.items():
            header, file = self._files[column]
            layers = values.numpy()[None] if header.ndim == 1 else values.numpy()
            num_images = header.shape[-1] if header.ndim == 1 else header.shape[1]
            row_bytes = header.nbytes // max(1, len(layers) * num_images)
            for layer, layer_rows in enumerate(layers):
                rows = np.ascontiguousarray(layer_rows[: max(0, num_images - first_row)])
                content = rows.data.cast("B") if rows.size else b""
                self._pwrite_all(file, content, header.offset + (layer * num_images + first_row) * row_bytes)

    def _pwrite_all(self, file: int, content: memoryview | bytes, offset: int) -> None:
        try:
            while content:
                written = os.pwrite(file, content, offset)
                content = content[written:]
                offset += written
        except OSError as error:
            raise _disk_shortage_error(self._draft, error) from None

    def fsync(self) -> None:
        """Sync the rows of this rank to disk. Raises: CheckpointError."""
        for _, file in self._files.values():
            try:
                os.fsync(file)
            except OSError as error:
                raise _disk_shortage_error(self._draft, error) from None

    def close(self) -> None:
        """Close the files."""
        for _, file in self._files.values():
            os.close(file)


def load_layer_features(
    run_dir: Path, subset: str, probed_layer_index: int, column: str, device: torch.device
) -> LayerFeatures:
    """Return cached features of a subset; ``probed_layer_index`` counts the probed layers, ``column`` is pooled or patches.

    Raises: DataError if no image of the subset has a label.
    """
    folder = run_dir / FEATURES_DIR
    labels = np.load(folder / f"{subset}-labels.npy")
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise DataError(f"{folder}: no image of the part '{subset}' has a label that can be read")
    rows = np.load(folder / f"{subset}-{column}.npy", mmap_mode="r")[probed_layer_index]
    return LayerFeatures(rows, labelled, torch.from_numpy(labels[labelled]).to(device))
