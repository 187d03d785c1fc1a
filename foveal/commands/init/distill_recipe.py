"""The recipe of distillation: a student with about a third of its teacher's weights."""

from pathlib import Path
from typing import Any

from foveal.commands.init.data_facts import DataFacts
from foveal.commands.init.draft import Draft
from foveal.commands.init.recipe import (
    Request,
    choose_model,
    choose_patch,
    choose_pretraining_batch,
    lr_per_256,
    set_augmentation,
    set_data,
    set_engine,
)
from foveal.errors import ConfigError
from foveal.models.backbone import BackboneCard, parse_encoder_card
from foveal.models.vit import EncoderCard
from foveal.weights.export import read_card

_PEAK_LR = {True: 5e-4, False: 1e-3}  # on GPUs, where models are larger, and on CPUs
_SHARE = 2 / 3  # of the teacher's width and depth: 0.3 of its weights
_NAMED_STUDENTS = {"vit_large": "vit_base", "vit_base": "vit_small", "vit_small": "vit_tiny"}


def draft_distillation(facts: DataFacts, request: Request) -> Draft:
    """Return the settings of a distillation but for its length. Raises: ConfigError without a teacher, ExportError."""
    if request.teacher is None:
        raise ConfigError("--teacher is missing: give the export of the model that teaches, such as runs/NAME/export")
    card = parse_encoder_card(read_card(Path(request.teacher)).encoder, request.teacher)
    image_size = list(card.image_size) if isinstance(card.image_size, tuple) else card.image_size
    batch_size, batch_reason = choose_pretraining_batch(facts, request)
    draft = Draft()
    draft.set("seed", 0)
    draft.set("epochs", 1)
    draft.set("teacher", request.teacher)
    method, reason = _choose_method(card)
    draft.set("method", method, reason)
    if method == "logits":
        draft.set("label_weight", 0.5 if facts.class_counts else 0.0, "the teacher has the rest")
    elif isinstance(card, BackboneCard):
        draft.set("patch_weight", 0.0, "a backbone of timm has other patches than the student")
    set_data(draft, facts, image_size, card.channels, own_stats=False)
    draft.reasons["data.image_size"] = "the teacher's"
    set_augmentation(draft, facts, card.channels, [0.2, 1.0])
    draft.set("batch", {"global_size": batch_size}, batch_reason)
    draft.set("model", _choose_student(facts, request, card), "about a third of the teacher's weights")
    draft.set("optim.lr_per_256", lr_per_256(_PEAK_LR[request.on_gpu], batch_size))
    draft.set("optim.warmup_epochs", 1.0)
    set_engine(draft, request, "deepspeed")
    return draft


def _choose_method(card: EncoderCard | BackboneCard) -> tuple[str, str]:
    if card.classes:
        return "logits", "the teacher is a classifier"
    return "features", "the teacher's final features"


def _choose_student(facts: DataFacts, request: Request, card: EncoderCard | BackboneCard) -> dict[str, Any]:
    """Return the student's settings: as asked for, the next smaller named model, or two thirds of width and depth."""
    if isinstance(card, BackboneCard):
        side = card.image_size if isinstance(card.image_size, int) else min(card.image_size)
        model = choose_model(facts, request)
        return {"name": model.pop("name"), "patch": choose_patch(facts, request, side)[0]} | model
    if request.model is not None:
        model = choose_model(facts, request)
        return {"name": model.pop("name"), "patch": card.patch} | model
    family = "_".join(card.name.split("_")[:2])
    is_as_named = (card.width, card.depth) in ((384, 12), (768, 12), (1024, 24))
    if is_as_named and family in _NAMED_STUDENTS:
        return {"name": f"{_NAMED_STUDENTS[family]}_patch16_224", "patch": card.patch}
    unit = 4 * card.heads
    width, depth = max(unit, round(card.width * _SHARE / unit) * unit), max(1, round(card.depth * _SHARE))
    return {"name": "vit_tiny_patch16_224", "patch": card.patch, "width": width, "depth": depth, "heads": card.heads}
