"""An export as a model that predicts: ``foveal.load``."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from foveal.inference.image_transform import ImageTransform, transform_from_card
from foveal.models.backbone import backbone_from_card
from foveal.models.vit import encoder_from_card
from foveal.weights.card import Card, task_of
from foveal.weights.export import load_weights_strict, read_card, read_export

ENCODER = "encoder"  # in place of a task: an export without a head


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


def load_exported_model(path: str | Path) -> ExportedModel:
    """Return the model of an export. Raises: ExportError, StorageUnreachableError."""
    path = Path(path)
    card = read_card(path)
    task = task_of_export(card)
    module = build_exported_encoder(path) if task == ENCODER else import_task(task).model_from_export(path)
    return ExportedModel(path, card, task, module.eval(), transform_from_card(card), card.classes)


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
