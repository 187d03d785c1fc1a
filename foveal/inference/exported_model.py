"""An export as a model that predicts: ``foveal.load``."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from foveal.errors import ExportError
from foveal.inference.image_transform import ImageTransform, transform_from_card
from foveal.models.backbone import backbone_from_card
from foveal.models.vit import encoder_from_card
from foveal.weights.card import Card, eval_pixels_from_card, settings_of, task_of
from foveal.weights.export import load_weights_strict, read_card, read_export

ENCODER = "encoder"  # in place of a task: an export without a head
_CARD, _EXPORT_DIR = "card.json", "export"
_MAX_LISTED = 5  # exports in a message
_RUN_FILES = ("config.yaml", "science.json")  # of a run directory, from its first attempt on


@dataclass(frozen=True)
class ExportedModel:
    """An exported model, in evaluation mode on the CPU, with what it needs.

    ``module`` maps normalised images [B, C, H, W], which ``transform`` makes of image files: an encoder to pooled
    features [B, D], a classifier to logits [B, K], a segmenter to logits [B, K, H, W], a detector to its head's outputs.
    ``task``: the setting ``task`` of its fine-tuning, or ``ENCODER``.
    ``classes``: the K names in the order of the outputs, empty for an encoder.
    """

    path: Path
    card: Card
    task: str
    module: nn.Module
    transform: ImageTransform
    classes: tuple[str, ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of its run that can change a result, by dotted name; empty for weights of no run."""
        return settings_of(self.card)

    @property
    def trained_hw(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that it was trained on: its window where it sees larger ones."""
        return eval_pixels_from_card(self.card).image_hw


def load_exported_model(path: str | Path) -> ExportedModel:
    """Return the model of an export, or of the export in a run directory. Raises: ExportError, StorageUnreachableError."""
    folder = find_export(path)
    card = read_card(folder)
    task = task_of_export(card)
    module = build_exported_encoder(folder) if task == ENCODER else import_task(task).model_from_export(folder)
    return ExportedModel(folder, card, task, module.eval(), transform_from_card(card), card.classes)


def find_export(path: str | Path) -> Path:
    """Return the folder of an export: the path itself, or of a run directory its export/.

    Raises: ExportError for a run that has written no export, or several.
    """
    folder = Path(path).expanduser()
    inner = folder / _EXPORT_DIR
    if (folder / _CARD).exists():
        return folder
    if (inner / _CARD).exists():
        return inner
    if exports := list_exports(folder):
        raise ExportError(f"{folder} is a run with several exports: give one of {format_folders(exports)}")
    if any((folder / name).exists() for name in _RUN_FILES):
        raise ExportError(f"{folder} is a run without an export: let it finish, by the command that began it")
    return folder  # ``read_card`` says what is missing


def list_exports(run: Path) -> list[Path]:
    """Return the exports of a run: its own, those of several students, and those of folds and trials."""
    places = (_EXPORT_DIR, f"{_EXPORT_DIR}/*", f"*/*/{_EXPORT_DIR}")
    return sorted({file.parent for place in places for file in run.glob(f"{place}/{_CARD}")})


def format_folders(folders: Sequence[Path]) -> str:
    """Return the first folders as words of a sentence, and how many more there are."""
    more = f" and {len(folders) - _MAX_LISTED} more" if len(folders) > _MAX_LISTED else ""
    return ", ".join(map(str, folders[:_MAX_LISTED])) + more


def task_of_export(card: Card) -> str:
    """Return the task of a card's head, ``ENCODER`` without a head."""
    return task_of(card) or ENCODER


def import_task(name: str) -> Any:
    """Return a task of fine-tuning; stages import foveal and never the reverse, so the import is dynamic.

    Raises: ConfigError.
    """
    return importlib.import_module("finetune.tasks.registry").find_task(name)


def build_exported_encoder(path: Path) -> nn.Module:
    """Return the encoder of an export, with a head of its own if it has one. Raises: ExportError."""
    weights, card = read_export(path)
    build = backbone_from_card if "timm" in card.encoder else encoder_from_card
    encoder = build(card.encoder, f"{path}/card.json")
    load_weights_strict(encoder, weights, path)
    return encoder
