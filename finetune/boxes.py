"""What cannot be where labels are boxes, found before a run begins."""

from finetune.config import FinetuneConfig
from foveal.average_precision import check_library
from foveal.errors import ConfigError
from foveal.models.backbone import BackboneCard
from foveal.models.detect import DetectCard, check_detector
from foveal.models.vit import EncoderCard


def check_settings(cfg: FinetuneConfig) -> None:
    """Refuse what is of images that have one class each, and a library that is not there. Errors: ConfigError."""
    idle = {
        "trials": cfg.trials,
        "label_smoothing": cfg.label_smoothing,
        "data.per_class": cfg.data.per_class,
        "data.holdout_per_class": cfg.data.holdout_per_class,
        "pooling": cfg.pooling != FinetuneConfig.model_fields["pooling"].default,
    }
    for name, given in idle.items():
        if given:
            raise ConfigError(f"{name} is for images that have one class each, and data.labels=boxes; leave it out")
    check_library()


def detector_card(cfg: FinetuneConfig, classes: tuple[str, ...]) -> DetectCard:
    """The card of what stands on the encoder."""
    sizes = cfg.detect
    return DetectCard(width=sizes.width, layers=sizes.layers, strides=sizes.strides, classes=len(classes))


def check_detection(cfg: FinetuneConfig, encoder: EncoderCard | BackboneCard, classes: tuple[str, ...]) -> None:
    """Refuse what no detector can be made of, of images to learn from and to evaluate. Errors: ConfigError."""
    for sides in dict.fromkeys((cfg.data.sides, cfg.data.val_sides)):
        check_detector(encoder, detector_card(cfg, classes), sides)
