"""The recipe of fine-tuning: the task from the labels, from an export or from scratch."""

from pathlib import Path
from typing import Any

from foveal.commands.init.data_facts import DataFacts, Labels
from foveal.commands.init.draft import Draft
from foveal.commands.init.recipe import (
    COMPARED_SEEDS,
    Request,
    choose_image_size,
    choose_model,
    choose_patch,
    fit_batch,
    lr_per_256,
    set_augmentation,
    set_data,
    set_engine,
)
from foveal.errors import ConfigError, DataError
from foveal.models.backbone import BackboneCard, parse_encoder_card
from foveal.models.config import VitConfig
from foveal.models.vit import EncoderCard, resolve_sizes
from foveal.weights.export import read_card

# Of small models, between those of configs/finetune/cifar10_small, camvid and digits; camvid_cars. On GPUs half of it:
# models are larger, and configs/finetune/imagenette has a third.
_PEAK_LR = {"classification": 1.5e-3, "multilabel": 1.5e-3, "segmentation": 1.5e-3, "detection": 5.0e-4}
# Of an export and few labels: with ten a class of Imagenette it keeps more of what was learned (docs/results.md).
_GENTLE_SHARE, _FEW_LABELLED = 1 / 3, 5_000
_DEFAULT_FIELDS = {"mask.png", "json", None}
_DENSE_TASKS = ("segmentation", "detection")
_EVAL_SIZE_RATIO = 4 / 3  # evaluated images show objects as large as crops of 0.2 to 1 of an image do
_FOLDS = 5


def draft_finetuning(facts: DataFacts, request: Request) -> Draft:
    """Return the settings of a fine-tuning but for its length.

    Raises: DataError if there is nothing to learn; ConfigError for a task that the labels do not allow; ExportError.
    """
    labels = _choose_labels(facts, request)
    card = None if request.init is None else parse_encoder_card(read_card(Path(request.init)).encoder, request.init)
    channels = facts.channels if card is None else card.channels
    draft = Draft()
    draft.set("seed", 0)
    draft.set("epochs", 1)
    if labels.task != "classification":
        others = ", ".join(other.task for other in facts.labels if other.task != labels.task)
        draft.set("task", labels.task, f"as the labels are; --task {others} is possible too" if others else "")
    if request.init is not None and not request.compare:
        draft.set("init", request.init, "the encoder: its model and pixel statistics apply")
    image_size = _choose_size(facts, request, card, labels.task)
    set_data(draft, facts, image_size, channels, own_stats=card is None)
    if card is not None and card.image_size == image_size:
        draft.reasons["data.image_size"] = "as in pretraining"
    num_labelled = _set_label_settings(draft, facts, request, labels)
    _set_evaluation_view(draft, facts, labels.task, image_size)
    batch_size = fit_batch(
        min(num_labelled / 2, _choose_batch_limit(request, labels.task, num_labelled)), request.ranks
    )
    set_augmentation(draft, facts, channels, [0.2, 1.0] if labels.task != "detection" else [0.4, 1.0])
    draft.set("batch", {"global_size": batch_size})
    _set_model(draft, facts, request, card, image_size, labels.task)
    _set_rate(draft, request, labels.task, num_labelled, batch_size)
    draft.set("optim.warmup_epochs", 1.0)
    draft.set("optim.betas", [0.9, 0.999])
    if card is not None and labels.task != "detection":
        draft.set("optim.layer_decay", 0.75, "early blocks change less")
    if labels.task == "detection":
        draft.set("optim.max_grad_norm", 1.0)
    if card is not None and request.compare:
        _set_comparison(draft, request.init, card)
    set_engine(draft, request, "accelerate")
    return draft


def _set_comparison(draft: Draft, init: str | None, card: EncoderCard | BackboneCard) -> None:
    """Set two arms: the export, and its model from scratch."""
    if isinstance(card, BackboneCard):
        draft.set("backbone", card.timm, "of both arms")
    else:
        named = resolve_sizes(VitConfig(name=card.name)).to_dict()
        sizes = {name: getattr(card, name) for name in named}
        draft.set(
            "model",
            {name: value for name, value in sizes.items() if name == "name" or value != named[name]},
            "of both arms",
        )
    arms = {"scratch": None, "pretrained": init}
    trials = {"arms": arms, "lr_per_256": [draft.settings["optim"]["lr_per_256"]], "repeats": COMPARED_SEEDS}
    draft.set("trials", trials, "each seed draws its own labels, order and head")


def _set_rate(draft: Draft, request: Request, task: str, num_labelled: int, batch_size: int) -> None:
    """Set the peak learning rate."""
    peak, reason = _PEAK_LR[task] / (2 if request.on_gpu else 1), ""
    if request.init is not None and task not in _DENSE_TASKS and num_labelled < _FEW_LABELLED:
        peak, reason = peak * _GENTLE_SHARE, "low, so that few labels change less of what was pretrained"
    draft.set("optim.lr_per_256", lr_per_256(peak, batch_size), reason)


def _choose_batch_limit(request: Request, task: str, num_labelled: int) -> int:
    """Return the largest batch: small for few images, which otherwise give few steps, and for dense labels."""
    if task in _DENSE_TASKS:
        return 64 if request.on_gpu else 16
    return (128 if request.on_gpu else 32) if num_labelled < _FEW_LABELLED else (1024 if request.on_gpu else 128)


def _choose_labels(facts: DataFacts, request: Request) -> Labels:
    if not facts.labels:
        raise DataError(
            f"{facts.path}: its images have no labels to fine-tune on: pack them with class folders, masks or boxes, or "
            f"index shards with .cls members (pretraining and distillation need none)"
        )
    if request.task is None:
        return facts.labels[0]
    chosen = next((labels for labels in facts.labels if labels.task == request.task), None)
    if chosen is None:
        tasks = ", ".join(labels.task for labels in facts.labels)
        raise ConfigError(f"--task {request.task} does not fit the labels of {facts.path}, which allow {tasks}")
    return chosen


def _choose_size(
    facts: DataFacts, request: Request, card: EncoderCard | BackboneCard | None, task: str
) -> int | list[int]:
    """Return the input size: the export's; for detection with the aspect ratio of the images, in whole patches."""
    if card is None:
        size: int | list[int] = choose_image_size(facts, request, is_dense=task in _DENSE_TASKS)
        patch = choose_patch(facts, request, size)[0]
    else:
        size = card.image_size if isinstance(card.image_size, int) else list(card.image_size)
        patch = card.patch if isinstance(card, EncoderCard) else 32
    if task != "detection" or isinstance(size, list):
        return size
    height, width = facts.image_hw
    scale = 1.5 * size / facts.short_side if 1.5 * size < facts.short_side else size / facts.short_side
    sides = [max(patch, round(side * scale / patch) * patch) for side in (height, width)]
    return sides[0] if sides[0] == sides[1] else sides


def _set_label_settings(draft: Draft, facts: DataFacts, request: Request, labels: Labels) -> int:
    """Set which samples and labels are used; return the number of training images."""
    if labels.field not in _DEFAULT_FIELDS:
        draft.set("data.label_field", labels.field)
    if labels.task == "segmentation":
        draft.set("data.ignore_id", labels.ignore_id, "the id of pixels without a label")
    num_labelled = sum(facts.class_counts) if labels.task == "classification" else facts.num_train
    if request.samples_per_class is not None:
        if labels.task != "classification":
            raise ConfigError(f"--samples-per-class is for task=classification, and the labels are for {labels.task}")
        draft.set("data.samples_per_class", request.samples_per_class, "labels a class that are used")
        num_labelled = min(num_labelled, request.samples_per_class * facts.num_classes)
    if not facts.num_val:
        if labels.task != "classification":
            raise DataError(
                f"{facts.path} has no split 'val' to evaluate on: pack it with a part for validation (--val-fraction)"
            )
        num_folds = _choose_num_folds(facts)
        draft.set("data.fold", {"of": num_folds, "number": 0}, f"no split val: one of {num_folds} parts evaluates")
        if request.samples_per_class is None:
            num_labelled = num_labelled * (num_folds - 1) // num_folds
    return num_labelled


def _choose_num_folds(facts: DataFacts) -> int:
    """Return the number of folds, each of which has some images of every class."""
    smallest = min((count for count in facts.class_counts if count), default=0)
    if smallest < 2:
        raise DataError(
            f"{facts.path} has no split 'val' to evaluate on, and a class of one image, of which no part can be held "
            f"out: give more images of this class, or images in folders train and val"
        )
    return min(_FOLDS, smallest)


def _set_evaluation_view(draft: Draft, facts: DataFacts, task: str, image_size: int | list[int]) -> None:
    """Set how evaluation sees an image: complete where its labels lie within it."""
    if task in _DENSE_TASKS:
        draft.set("data.eval_crop_ratio", 1.0, "whole images")
    elif facts.short_side <= 48:
        draft.set("data.eval_crop_ratio", 1.0, "small images show one thing, up to their edges")
    if task == "segmentation" and isinstance(image_size, int):
        scale = max(image_size, round(min(image_size * _EVAL_SIZE_RATIO, facts.short_side))) / facts.short_side
        sides = [max(image_size, round(side * scale)) for side in facts.image_hw]
        if sides != [image_size, image_size]:
            draft.set("data.eval_size", sides, "seen through windows of image_size")


def _set_model(
    draft: Draft,
    facts: DataFacts,
    request: Request,
    card: EncoderCard | BackboneCard | None,
    image_size: int | list[int],
    task: str,
) -> None:
    """Set encoder, head and regularisation."""
    patch, depth = 0, 0
    if card is None:
        side = image_size if isinstance(image_size, int) else min(image_size)
        model = choose_model(facts, request)
        patch = choose_patch(facts, request, side)[0]
        settings: dict[str, Any] = {"name": model.pop("name"), "patch": patch} | model
        draft.set("model", settings, "from scratch; --init EXPORT starts from a pretrained encoder")
        depth = resolve_sizes(VitConfig.from_dict(settings, "model")).depth
    elif isinstance(card, EncoderCard):
        patch, depth = card.patch, card.depth
    if task == "classification":
        draft.set("label_smoothing", 0.1)
    elif task == "detection" and patch:
        strides = [patch // 2 if patch % 2 == 0 else patch, patch, patch * 2, patch * 4]
        head = {} if request.on_gpu else {"width": 64, "layers": 2}
        draft.set("detect", head | {"strides": sorted(set(strides))}, "pixels between the places that predict boxes")
    if depth >= 12:
        draft.set("drop_path", 0.1, "for deep encoders")
