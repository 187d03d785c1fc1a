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

from finetune.model import classifier
from finetune.probe.plan import ProbePlan, Shapes
from foveal.atomic import publish, write_json
from foveal.data import Batch, normalise
from foveal.engines.base import autocast
from foveal.errors import CheckpointError, DataError, ExportError
from foveal.models.backbone import whole_alone
from foveal.models.probes import read_layers
from foveal.models.resize import resized_from_card
from foveal.models.vit import encoder_from_card
from foveal.seeding import key
from foveal.training.run import Run
from foveal.weights.export import load_strictly

Look = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # images to (features [S, B, F], patches [S, B, L, D])
FOLDER = "features"
FACTS = "facts.json"
_FORMAT = 1
_SCIENCE = ("data.", "inherited.", "model", "backbone", "pooling", "probe.layers", "probe.features", "seed")


@dataclass(frozen=True)
class Part:
    """One layer of the kept features of a part of the data, without the images that have no label."""

    rows: np.ndarray  # [N, ...], on disk
    known: np.ndarray  # int64 [M]: the rows that have a label
    labels: Tensor  # int64 [M], on the device

    def __len__(self) -> int:
        return len(self.known)

    def take(self, positions: np.ndarray | slice) -> Tensor:
        """The features of some of the M images, float32 on the device."""
        chosen = torch.from_numpy(self.rows[self.known[positions]])
        return chosen.to(self.labels.device).float()


def facts_of(plan: ProbePlan) -> dict[str, Any]:
    """All that the features depend on, as plain data: the export's sha256 and the data's digests are among it."""
    science = {name: value for name, value in plan.science().items() if name.startswith(_SCIENCE)}
    shapes = {name: [list(shape), np.dtype(kind).name] for name, (shape, kind) in plan.shapes.items()}
    precision = plan.cfg.engine.precision
    return json.loads(json.dumps({"format": _FORMAT, "files": shapes, "precision": precision, "science": science}))


def kept(plan: ProbePlan, run: Path) -> bool:
    """Whether the features are there. Errors: CheckpointError where they are of something else."""
    folder = run / FOLDER
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        found = {}
    told = facts_of(plan)
    other = [name for name in told if found.get(name) != told[name]]
    other = [f"{each} of {name}" for name in other for each in _differing(found.get(name), told[name])] or other
    if other:
        raise CheckpointError(
            f"{folder} holds features of another kind (differing: {', '.join(other[:5])}): remove that folder, or set "
            f"run.fresh=true"
        )
    return True


def _differing(found: Any, told: Any) -> list[str]:
    if not isinstance(found, dict) or not isinstance(told, dict):
        return []
    return sorted(name for name in found | told if found.get(name) != told.get(name))


def keep(plan: ProbePlan, run: Run) -> bool:
    """Compute and keep the features of all parts; false if the run was asked to leave. Every rank calls it.

    Errors: DataError, CheckpointError where there is no room.
    """
    draft = run.path / f".draft-{FOLDER}-{run.attempt.number}"  # a superseded attempt writes into no other's
    run.world.once(lambda: _prepare(plan, run.path, draft))
    _, look = looked_at(plan, run.world.device)
    for name, (split, part) in plan.parts.items():
        files = _Rows(draft, name, plan.shapes)
        with closing(files), closing(run.evaluation(0, split=split, part=part)) as batches:
            for batch in batches:
                place = (batch.micro * run.world.size + run.world.rank) * plan.cfg.batch.at_once
                run.world.together(partial(_one, plan, look, files, place, batch.to(run.world.device)))
                if run.asked_to_leave():
                    return False
            run.world.together(files.force)
    run.world.once(lambda: publish(draft, run.path / FOLDER))
    return True


def _one(plan: ProbePlan, look: Look, files: "_Rows", first: int, batch: Batch) -> None:
    files.write(first, _seen(plan, look, batch.images) | {"labels": batch.labels.cpu()})


def _prepare(plan: ProbePlan, run: Path, draft: Path) -> None:
    """An empty draft with room for every row; those of attempts that were killed are gone. Errors: CheckpointError."""
    for old in run.glob(f".draft-{FOLDER}-*"):
        shutil.rmtree(old)
    try:
        draft.mkdir()
        for name, (shape, kind) in plan.shapes.items():
            np.lib.format.open_memmap(draft / name, mode="w+", dtype=kind, shape=shape)
        write_json(draft / FACTS, facts_of(plan))
    except OSError as error:
        raise _no_room(draft, error) from None


def _no_room(where: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{where} cannot keep the features ({error.strerror}): make room, or set run.dir to another disk"
    )


def looked_at(plan: ProbePlan, device: torch.device) -> tuple[nn.Module, Look]:
    """The frozen model, and how it is looked at."""
    cfg, probe = plan.cfg, plan.probe
    if plan.backbone:
        backbone = classifier(plan).encoder.to(device).eval()
        return backbone, lambda images: (whole_alone(backbone, images)[0][None], None)
    encoder = frozen(plan).to(device).eval()
    features = probe.features or cfg.pooling
    return encoder, lambda images: read_layers(encoder, images, plan.layers, features)


def frozen(plan: ProbePlan) -> Any:
    """The encoder with all that it was exported with but its head: its own norm, before or behind the pooling.

    Without an export, one that is freshly drawn: random features are a baseline.
    """
    cfg = plan.cfg
    torch.manual_seed(key(cfg.seed, "weights"))
    if plan.start is None:
        return encoder_from_card(plan.encoder, "model", pooling="token", classes=0)
    place, card = plan.start.place, plan.start.card
    size = {"image_size": cfg.data.tree()["image_size"]}
    encoder = encoder_from_card(card.encoder | size, f"{place}/card.json", classes=0)
    weights = resized_from_card(plan.start.weights(), encoder, card.encoder, f"{place}/card.json")
    load_strictly(encoder, weights, place, unused=("head.",))
    return encoder


@torch.no_grad()
def _seen(plan: ProbePlan, look: Look, images: Tensor) -> dict[str, Tensor]:
    """What goes into each kind of file, on the CPU, of images uint8 [B, C, H, W]. Errors: DataError if it is not finite."""
    probe = plan.probe
    with autocast(images.device, plan.cfg.engine.precision):
        pooled, patches = look(normalise(images, plan.mean, plan.std))
    found = {"pooled": pooled.float().cpu()} if probe.pooled else {}
    if probe.patches:
        assert patches is not None, "the plan refuses attentive probes of a model of timm"
        found["patches"] = (
            patches.half().cpu()
        )  # behind a norm numbers are small, and float16 has 3 bits more than bf16
    if not all(bool(each.isfinite().all()) for each in found.values()):
        raise ExportError(
            f"{plan.cfg.init or 'the model'} gives features that are not finite: nothing can be learned on them"
        )
    return found


class _Rows:
    """The open files of a part, which several ranks write at once: each its own rows, never a page of another's."""

    def __init__(self, draft: Path, part: str, shapes: Shapes) -> None:
        self._draft = draft
        self._files: dict[str, tuple[np.memmap, int]] = {}
        for name in shapes:
            of, _, column = name.removesuffix(".npy").partition("-")
            if of == part:
                header = np.load(draft / name, mmap_mode="r")
                self._files[column] = header, os.open(draft / name, os.O_WRONLY)

    def write(self, first: int, columns: dict[str, Tensor]) -> None:
        """Put rows [S, B, ...], or [B] for labels, where the part's image ``first`` is; what is past its end fills up.

        Errors: CheckpointError where there is no room.
        """
        for column, values in columns.items():
            header, file = self._files[column]
            layers = values.numpy()[None] if header.ndim == 1 else values.numpy()
            images = header.shape[-1] if header.ndim == 1 else header.shape[1]
            size = header.nbytes // max(1, len(layers) * images)
            for layer, rows in enumerate(layers):
                wanted = np.ascontiguousarray(rows[: max(0, images - first)])
                self._put(
                    file,
                    wanted.data.cast("B") if wanted.size else b"",
                    header.offset + (layer * images + first) * size,
                )

    def _put(self, file: int, content: memoryview | bytes, place: int) -> None:
        try:
            while content:
                written = os.pwrite(file, content, place)
                content, place = content[written:], place + written
        except OSError as error:
            raise _no_room(self._draft, error) from None

    def force(self) -> None:
        """All rows of this rank are on disk. Errors: CheckpointError."""
        for _, file in self._files.values():
            try:
                os.fsync(file)
            except OSError as error:
                raise _no_room(self._draft, error) from None

    def close(self) -> None:
        """The files are closed."""
        for _, file in self._files.values():
            os.close(file)


def read_part(run: Path, name: str, layer: int, column: str, device: torch.device) -> Part:
    """The kept features of a part: the ``layer``-th of those that are read, ``column`` is pooled or patches.

    Errors: DataError where no image of the part has a label.
    """
    folder = run / FOLDER
    labels = np.load(folder / f"{name}-labels.npy")
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise DataError(f"{folder}: no image of the part '{name}' has a label that can be read")
    rows = np.load(folder / f"{name}-{column}.npy", mmap_mode="r")[layer]
    return Part(rows, known, torch.from_numpy(labels[known]).to(device))
