"""Checks of fine-tuning's settings: combinations that exclude each other, and settings that a task does not support."""

from typing import Any

import torch
from torch import nn

from finetune.config import FinetuneConfig
from finetune.tasks.average_precision import check_pycocotools
from foveal.data.config import LabelKind
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    build_backbone,
    build_meta_backbone,
    check_classifier_training,
    format_image_size,
    get_layer_ids,
    has_distillation_token,
    set_activation_checkpointing,
)
from foveal.models.config import Pooling
from foveal.models.detect import check_detector_meta_forward
from foveal.models.segment import check_segmenter_training
from foveal.models.vit import EncoderCard
from foveal.weights.export import Card

_DENSE_KINDS: tuple[LabelKind, ...] = ("mask", "boxes")  # the head reads every patch and no pooled feature
_CLASSIFICATION_SETTINGS = ("mixup", "cutmix", "erase", "dropout", "average")


def check_settings(cfg: FinetuneConfig) -> None:
    """Raise ConfigError if settings exclude each other, as far as the config alone tells."""
    kind = cfg.data.labels
    default = FinetuneConfig.model_construct()
    if kind in _DENSE_KINDS:
        for name in _CLASSIFICATION_SETTINGS:
            if getattr(cfg, name) != getattr(default, name):
                raise ConfigError(f"{name} is for images with classes, and data.labels is {kind}; leave it out")
    if kind in _DENSE_KINDS and cfg.data.augment.operations:
        raise ConfigError(
            f"data.augment.rand_augment.ops transforms images but not their {kind}; leave it out with data.labels={kind}"
        )
    for name in ("teacher", "adversarial"):
        if kind != "class" and getattr(cfg, name) is not None:
            raise ConfigError(f"{name} is for images with one class, and data.labels is {kind}; leave one of them out")
    if kind != "class" and cfg.class_weights == "balanced":
        raise ConfigError(
            f"class_weights=balanced counts classes in the index, which has none of data.labels={kind}; give a list of "
            "weights"
        )
    if cfg.freeze_encoder and cfg.drop_path:
        raise ConfigError(
            f"drop_path={cfg.drop_path:g} is for a trained encoder, and freeze_encoder=true freezes it; leave one out"
        )
    _check_adversarial(cfg)


def check_stopping_uses_holdout(cfg: FinetuneConfig, nested_run_phrase: str) -> None:
    """Raise ConfigError if a nested run (``nested_run_phrase``, such as "a fold") would stop by the data that evaluates it."""
    if cfg.early_stopping_metric is not None and not cfg.early_stopping_metric.startswith("holdout_"):
        raise ConfigError(
            f"early_stopping.metric={cfg.early_stopping_metric} would stop {nested_run_phrase} by the data that it is evaluated on: "
            f"take a holdout_ metric, with data.holdout_per_class"
        )


def check_mixup_pairing(cfg: FinetuneConfig, microbatch_size: int) -> None:
    """Raise ConfigError if mixup or cutmix cannot pair the images of a microbatch."""
    if (cfg.mixup or cfg.cutmix) and microbatch_size % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a microbatch, which has {microbatch_size} here: take an even number "
            f"of images per rank (batch.global_size, batch.max_micro_size)"
        )


def check_split_batch_norm(cfg: FinetuneConfig, model_name: str, *, has_batch_norm: bool) -> None:
    """Raise ConfigError if adversarial.separate_batchnorm is set for a model without BatchNorm."""
    if cfg.adversarial is not None and cfg.adversarial.separate_batchnorm and not has_batch_norm:
        raise ConfigError(
            f"adversarial.separate_batchnorm is for BatchNorm, which {model_name} does not have; leave it out"
        )


def check_distillation_token(cfg: FinetuneConfig, card: EncoderCard | BackboneCard) -> None:
    """Raise ConfigError if teacher.kind=token and the encoder has no token to distill into."""
    if cfg.teacher is None or cfg.teacher.kind != "token":
        return
    if isinstance(card, BackboneCard):
        if not has_distillation_token(build_meta_backbone(*card.build_args, card.classes)):
            raise ConfigError(
                f"teacher.kind=token trains a distillation token, which {card.timm} does not have; take a backbone "
                f"such as deit_tiny_distilled_patch16_224, or kind=hard"
            )
    elif not card.registers:
        raise ConfigError(
            "teacher.kind=token trains the first register as distillation token, and the encoder has none; give it "
            "model.registers=1, or take kind=hard"
        )
    elif card.pooling != "token":
        raise ConfigError(
            f"teacher.kind=token reads normalized tokens, and with pooling={card.pooling} there is no norm before the "
            f"pooling; set pooling=token"
        )


def resolve_pooling(cfg: FinetuneConfig) -> Pooling:
    """Return the encoder's pooling; dense heads read all tokens, so they get "token", which normalizes every token."""
    return "token" if cfg.data.labels in _DENSE_KINDS else cfg.pooling


def check_task_settings(cfg: FinetuneConfig, export_card: Card | None) -> None:
    """Check settings and export against the label kind.

    Raises: ConfigError for settings of another task, ExportError for an export that the task cannot start from.
    """
    labels = cfg.data.labels
    for name, section, kind in (("segment", cfg.segment, "mask"), ("detect", cfg.detect, "boxes")):
        if labels != kind and section != type(section)():
            raise ConfigError(f"{name} is for data.labels={kind}, and data.labels={labels}; leave it out")
    lacks_token_norm = (
        export_card is not None and export_card.encoder.get("pooling") == "avg" and resolve_pooling(cfg) == "token"
    )
    if lacks_token_norm and cfg.probe is None:  # a probe reads the encoder with the export's own pooling and norm
        raise ExportError(
            f"the export {cfg.init} was fine-tuned with pooling=avg and has no norm behind its tokens; give a "
            f"pretrained encoder, or one fine-tuned with pooling=token"
        )
    if labels not in _DENSE_KINDS:
        return
    if cfg.pooling != FinetuneConfig.model_fields["pooling"].default:
        raise ConfigError(
            f"pooling={cfg.pooling} is of classifiers; with data.labels={labels} every patch is read: leave it out"
        )
    if labels == "mask" and any(
        val < side for val, side in zip(cfg.data.eval_image_hw, cfg.data.image_hw, strict=True)
    ):
        raise ConfigError(
            f"data.eval_size is {format_image_size(cfg.data.eval_image_hw)} and data.image_size "
            f"{format_image_size(cfg.data.image_hw)}: an evaluated image must hold at least one window of image_size"
        )
    if labels == "boxes":
        _check_detection_settings(cfg)


def check_trials_evaluation(cfg: FinetuneConfig) -> None:
    """Raise ConfigError if trials have no top-1 to compare, or would stop by the data that evaluates them."""
    check_stopping_uses_holdout(cfg, "a trial")
    if cfg.data.labels != "class":
        raise ConfigError(
            f"trials compares top-1, which data.labels={cfg.data.labels} has not: start a run for each initialization "
            f"and learning rate instead"
        )


def check_backbone_supports_settings(
    card: BackboneCard, cfg: FinetuneConfig, microbatch_size: int, num_classes: int
) -> None:
    """Raise ConfigError if the timm model does not support the settings."""
    default = FinetuneConfig.model_fields["pooling"].default
    if cfg.pooling != default:
        raise ConfigError(f"pooling={cfg.pooling} is of foveal's encoders, {card.timm} has its own; leave it out")
    # A frozen backbone has no training forward of its own, so that a microbatch of 1 is no error there.
    check_backbone_forward(card, cfg, max(2, microbatch_size) if cfg.freeze_encoder else microbatch_size, num_classes)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone: Any = build_backbone(*card.build_args, num_classes=card.classes, drop_path=cfg.drop_path)
    if cfg.dropout and not isinstance(backbone.get_classifier(), nn.Linear):
        raise ConfigError(
            f"dropout={cfg.dropout:g} is before one linear head, which {card.timm} does not have; leave it out"
        )
    if cfg.optim.layer_decay < 1:
        get_layer_ids(backbone)
    if cfg.engine.activation_checkpointing:
        set_activation_checkpointing(backbone, enable=True)


def check_backbone_forward(card: BackboneCard, cfg: FinetuneConfig, microbatch_size: int, num_classes: int) -> None:
    """Raise ConfigError if a training forward of the timm model would fail."""
    if cfg.data.labels == "mask":
        check_segmenter_training(card, cfg.segment.head_card(num_classes), microbatch_size)
    elif cfg.data.labels != "boxes":  # ``check_detector_forward`` checks detectors
        check_classifier_training(*card.build_args, card.classes, microbatch_size)


def check_detector_forward(
    cfg: FinetuneConfig, encoder: EncoderCard | BackboneCard, microbatch_size: int, num_classes: int
) -> None:
    """Raise ConfigError if a forward of the detector would fail, in training or in evaluation."""
    head = cfg.detect.head_card(num_classes)
    check_detector_meta_forward(encoder, head, cfg.data.image_hw, microbatch_size, train=True)
    check_detector_meta_forward(encoder, head, cfg.data.eval_image_hw, 1, train=False)


def _check_adversarial(cfg: FinetuneConfig) -> None:
    """Raise ConfigError if the engine or other settings exclude adversarial training."""
    adversarial = cfg.adversarial
    if adversarial is None:
        return
    if cfg.engine.kind == "accelerate" and cfg.engine.sharding == "deepspeed":
        raise ConfigError(
            "adversarial needs gradients of images, which engine.sharding=deepspeed does not give; use ddp or fsdp2"
        )
    if adversarial.separate_batchnorm and cfg.engine.activation_checkpointing:
        raise ConfigError(
            "adversarial.separate_batchnorm and engine.activation_checkpointing exclude each other: the recomputation in the backward pass "
            "would use the clean images' norms; leave one of them out"
        )
    if adversarial.separate_batchnorm and not adversarial.weight:
        raise ConfigError(
            "adversarial.separate_batchnorm=true needs attacked images in the loss: set adversarial.weight above 0"
        )


def _check_detection_settings(cfg: FinetuneConfig) -> None:
    """Raise ConfigError if settings of one class an image are set, or pycocotools is missing."""
    classification_only = {
        "label_smoothing": cfg.label_smoothing,
        "class_weights": cfg.class_weights,
        "data.samples_per_class": cfg.data.samples_per_class,
        "data.holdout_per_class": cfg.data.holdout_per_class,
    }
    for name, value in classification_only.items():
        if value:
            raise ConfigError(f"{name} is for images that have one class each, and data.labels=boxes; leave it out")
    check_pycocotools()
