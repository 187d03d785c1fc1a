"""Whether the settings fit what the kind of label makes of fine-tuning: every sentence why not."""

from finetune.config import FinetuneConfig
from foveal.average_precision import check_library
from foveal.checkpoint.export import Card
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import BackboneCard, check_training, times
from foveal.models.detect import DetectCard, check_detector
from foveal.models.segment import SegmentCard, check_segmenter
from foveal.models.vit import EncoderCard, Pooling

_EVERY_PATCH = ("mask", "boxes")  # kinds of labels whose head reads every patch, and no pooled feature


def pooling(cfg: FinetuneConfig) -> Pooling:
    """How the encoder is pooled; where every patch is read, nothing is, and the norm is behind all tokens."""
    return "token" if cfg.data.labels in _EVERY_PATCH else cfg.pooling


def check_kind(cfg: FinetuneConfig, card: Card | None) -> None:
    """Errors: ConfigError for settings that this kind of label cannot have, ExportError for an export that it cannot."""
    labels = cfg.data.labels
    for name, section, kind in (("segment", cfg.segment, "mask"), ("detect", cfg.detect, "boxes")):
        if labels != kind and section != type(section)():
            raise ConfigError(f"{name} is for data.labels={kind}, and data.labels={labels}; leave it out")
    if labels not in _EVERY_PATCH:
        return
    if cfg.pooling != FinetuneConfig.model_fields["pooling"].default:
        raise ConfigError(
            f"pooling={cfg.pooling} is of classifiers; with data.labels={labels} every patch is read: leave it out"
        )
    if labels == "mask" and any(val < side for val, side in zip(cfg.data.val_sides, cfg.data.sides, strict=True)):
        raise ConfigError(
            f"data.val_size is {times(cfg.data.val_sides)} and data.image_size {times(cfg.data.sides)}: an evaluated "
            f"image must hold at least one window of image_size"
        )
    if labels == "boxes":
        _check_settings_of_boxes(cfg)
    if card is not None and card.encoder.get("pooling") == "avg":
        raise ExportError(
            f"the export {cfg.init} was fine-tuned with pooling=avg and has no norm behind its tokens; give a pretrained "
            f"encoder, or one fine-tuned with pooling=token"
        )


def check_comparison(cfg: FinetuneConfig) -> None:
    """Errors: ConfigError for a comparison of what has no top-1."""
    if cfg.data.labels in _EVERY_PATCH:
        raise ConfigError(
            f"trials compares top-1, which data.labels={cfg.data.labels} has not: start one run for each way to start and "
            f"each rate"
        )


def check_model(card: BackboneCard, cfg: FinetuneConfig, at_once: int, classes: int) -> None:
    """Errors: ConfigError where a training forward of a model of timm would fail."""
    if cfg.data.labels == "mask":
        check_segmenter(card, head_of(cfg, classes), at_once)
    elif cfg.data.labels != "boxes":  # see ``check_boxes``
        check_training(*card.shape, card.classes, at_once)


def head_of(cfg: FinetuneConfig, classes: int) -> SegmentCard:
    """The head of a segmentation of so many classes."""
    return SegmentCard(head=cfg.segment.head, width=cfg.segment.width, classes=classes)


def check_boxes(cfg: FinetuneConfig, encoder: EncoderCard | BackboneCard, at_once: int, classes: int) -> None:
    """Errors: ConfigError where a training forward of a detector would fail, or one of evaluated images."""
    head = detector_of(cfg, classes)
    check_detector(encoder, head, cfg.data.sides, at_once, train=True)
    check_detector(encoder, head, cfg.data.val_sides, 1, train=False)


def detector_of(cfg: FinetuneConfig, classes: int) -> DetectCard:
    """The pyramid and head of a detector of so many classes."""
    sizes = cfg.detect
    return DetectCard(width=sizes.width, layers=sizes.layers, strides=sizes.strides, classes=classes)


def _check_settings_of_boxes(cfg: FinetuneConfig) -> None:
    given = {
        "label_smoothing": cfg.label_smoothing,
        "data.per_class": cfg.data.per_class,
        "data.holdout_per_class": cfg.data.holdout_per_class,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is for images that have one class each, and data.labels=boxes; leave it out")
    check_library()
