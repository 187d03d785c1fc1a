"""Whether the settings fit what the kind of label makes of fine-tuning: every sentence why not."""

from finetune.config import FinetuneConfig, SegmentConfig
from foveal.checkpoint.export import Card
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import BackboneCard, check_training, times
from foveal.models.segment import SegmentCard, check_segmenter
from foveal.models.vit import Pooling


def pooling(cfg: FinetuneConfig) -> Pooling:
    """How the encoder is pooled; where every patch is read, nothing is, and the norm is behind all tokens."""
    return "token" if cfg.data.labels == "mask" else cfg.pooling


def check_kind(cfg: FinetuneConfig, card: Card | None) -> None:
    """Errors: ConfigError for settings that this kind of label cannot have, ExportError for an export that it cannot."""
    labels = cfg.data.labels
    if labels != "mask":
        if cfg.segment != SegmentConfig():
            raise ConfigError(f"segment is for data.labels=mask, and data.labels={labels}; leave it out")
        return
    if cfg.pooling != FinetuneConfig.model_fields["pooling"].default:
        raise ConfigError(
            f"pooling={cfg.pooling} is of classifiers; with data.labels=mask every patch is read: leave it out"
        )
    if any(val < side for val, side in zip(cfg.data.val_sides, cfg.data.sides, strict=True)):
        raise ConfigError(
            f"data.val_size is {times(cfg.data.val_sides)} and data.image_size {times(cfg.data.sides)}: an evaluated "
            f"image must hold at least one window of image_size"
        )
    if card is not None and card.encoder.get("pooling") == "avg":
        raise ExportError(
            f"the export {cfg.init} was fine-tuned with pooling=avg and has no norm behind its tokens; give a pretrained "
            f"encoder, or one fine-tuned with pooling=token"
        )


def check_comparison(cfg: FinetuneConfig) -> None:
    """Errors: ConfigError for a comparison of what has no top-1."""
    if cfg.data.labels == "mask":
        raise ConfigError(
            "trials compares top-1, which data.labels=mask has not: start one run for each way to start and each rate"
        )


def check_model(card: BackboneCard, cfg: FinetuneConfig, at_once: int, classes: int) -> None:
    """Errors: ConfigError where a training forward of a model of timm would fail."""
    if cfg.data.labels == "mask":
        check_segmenter(card, head_of(cfg, classes), at_once)
    else:
        check_training(*card.shape, card.classes, at_once)


def head_of(cfg: FinetuneConfig, classes: int) -> SegmentCard:
    """The head of a segmentation of so many classes."""
    return SegmentCard(head=cfg.segment.head, width=cfg.segment.width, classes=classes)
