"""What the settings of fine-tuning cannot mean together, or for this kind of label: every sentence why not."""

from finetune.config import FinetuneConfig
from finetune.tasks.average_precision import check_pycocotools
from foveal.data import LabelKind
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    build_meta_backbone,
    check_training_forward,
    format_image_size,
    has_distillation_token,
)
from foveal.models.detect import check_detector
from foveal.models.segment import check_segmenter_training
from foveal.models.vit import EncoderCard, Pooling
from foveal.weights.export import Card

_DENSE_KINDS: tuple[LabelKind, ...] = ("mask", "boxes")  # whose head reads every patch, and no pooled feature
_CLASSIFICATION_SETTINGS = ("mixup", "cutmix", "erase", "dropout", "average")


def check_settings(cfg: FinetuneConfig) -> None:
    """What the settings alone tell. Raises: ConfigError."""
    kind = cfg.data.labels
    default = FinetuneConfig.model_construct()
    if kind in _DENSE_KINDS:
        for name in _CLASSIFICATION_SETTINGS:
            if getattr(cfg, name) != getattr(default, name):
                raise ConfigError(f"{name} is for images with classes, and data.labels is {kind}; leave it out")
    if kind in _DENSE_KINDS and cfg.data.augment.operations:
        raise ConfigError(
            f"data.augment.operations moves what images show and not their {kind}; leave it out with data.labels={kind}"
        )
    for name in ("teacher", "adversarial"):
        if kind != "class" and getattr(cfg, name) is not None:
            raise ConfigError(f"{name} is for images with one class, and data.labels is {kind}; leave one of them out")
    if kind != "class" and cfg.class_weights == "balanced":
        raise ConfigError(
            f"class_weights=balanced counts classes in the index, which has none of data.labels={kind}; give a list of weights"
        )
    if cfg.frozen and cfg.drop_path:
        raise ConfigError(
            f"drop_path={cfg.drop_path:g} is for an encoder that learns, and frozen=true keeps it from it"
        )
    _check_adversarial(cfg)


def check_holdout_stopping(cfg: FinetuneConfig, run_kind: str) -> None:
    """Runs that are compared must not stop by what they are judged on. Raises: ConfigError."""
    if cfg.plateau_metric is not None and not cfg.plateau_metric.startswith("holdout_"):
        raise ConfigError(
            f"early_stopping.metric={cfg.plateau_metric} would judge {run_kind} by what it stopped at: stop by a holdout_ number, with "
            f"data.holdout_per_class"
        )


def check_even_microbatch(cfg: FinetuneConfig, microbatch_size: int) -> None:
    """Mixup and cutmix pair the images of a micro. Raises: ConfigError."""
    if (cfg.mixup or cfg.cutmix) and microbatch_size % 2:
        raise ConfigError(
            f"mixup and cutmix pair images that a rank holds at once, which are {microbatch_size} here: take an even number of "
            f"images a rank (batch.images, batch.at_once)"
        )


def check_split_batchnorm(cfg: FinetuneConfig, model_name: str, *, has_batchnorm: bool) -> None:
    """Whether there are norms to be split. Raises: ConfigError."""
    if cfg.adversarial is not None and cfg.adversarial.split_norms and not has_batchnorm:
        raise ConfigError(f"adversarial.split_norms is for BatchNorm, which {model_name} does not have; leave it out")


def check_distillation_token(cfg: FinetuneConfig, card: EncoderCard | BackboneCard) -> None:
    """Whether there is a distillation token to be taught. Raises: ConfigError."""
    if cfg.teacher is None or cfg.teacher.kind != "token":
        return
    if isinstance(card, BackboneCard):
        if not has_distillation_token(build_meta_backbone(*card.build_args, card.classes)):
            raise ConfigError(
                f"teacher.kind=token teaches a distillation token, which {card.timm} has not; take a backbone such as "
                f"deit_tiny_distilled_patch16_224, or kind=hard"
            )
    elif not card.registers:
        raise ConfigError(
            "teacher.kind=token teaches the first register as distillation token, and the encoder has none; give it "
            "model.registers=1, or take kind=hard"
        )
    elif card.pooling != "token":
        raise ConfigError(
            f"teacher.kind=token reads tokens behind a norm, and with pooling={card.pooling} there is none; set pooling=token"
        )


def resolve_pooling(cfg: FinetuneConfig) -> Pooling:
    """How the encoder is pooled; where every patch is read, nothing is, and the norm is behind all tokens."""
    return "token" if cfg.data.labels in _DENSE_KINDS else cfg.pooling


def check_task_settings(cfg: FinetuneConfig, card: Card | None) -> None:
    """Raises: ConfigError for settings that this kind of label cannot have, ExportError for an export that it cannot."""
    labels = cfg.data.labels
    for name, section, kind in (("segment", cfg.segment, "mask"), ("detect", cfg.detect, "boxes")):
        if labels != kind and section != type(section)():
            raise ConfigError(f"{name} is for data.labels={kind}, and data.labels={labels}; leave it out")
    behind = card is not None and card.encoder.get("pooling") == "avg" and resolve_pooling(cfg) == "token"
    if behind and cfg.probe is None:  # which reads what is behind the export's own norm
        raise ExportError(
            f"the export {cfg.init} was fine-tuned with pooling=avg and has no norm behind its tokens; give a pretrained "
            f"encoder, or one fine-tuned with pooling=token"
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
            f"data.val_size is {format_image_size(cfg.data.eval_image_hw)} and data.image_size {format_image_size(cfg.data.image_hw)}: an evaluated "
            f"image must hold at least one window of image_size"
        )
    if labels == "boxes":
        _check_detection_settings(cfg)


def check_trials(cfg: FinetuneConfig) -> None:
    """Raises: ConfigError for a comparison of what has no top-1, or that stops by what it is judged on."""
    check_holdout_stopping(cfg, "a trial")
    if cfg.data.labels != "class":
        raise ConfigError(
            f"trials compares top-1, which data.labels={cfg.data.labels} has not: start one run for each way to start and "
            f"each rate"
        )


def check_backbone_forward(card: BackboneCard, cfg: FinetuneConfig, microbatch_size: int, num_classes: int) -> None:
    """Raises: ConfigError where a training forward of a model of timm would fail."""
    if cfg.data.labels == "mask":
        check_segmenter_training(card, cfg.segment.head_card(num_classes), microbatch_size)
    elif cfg.data.labels != "boxes":  # see ``check_boxes``
        check_training_forward(*card.build_args, card.classes, microbatch_size)


def check_detector_forward(
    cfg: FinetuneConfig, encoder: EncoderCard | BackboneCard, microbatch_size: int, num_classes: int
) -> None:
    """Raises: ConfigError where a training forward of a detector would fail, or one of evaluated images."""
    head = cfg.detect.head_card(num_classes)
    check_detector(encoder, head, cfg.data.image_hw, microbatch_size, train=True)
    check_detector(encoder, head, cfg.data.eval_image_hw, 1, train=False)


def _check_adversarial(cfg: FinetuneConfig) -> None:
    told = cfg.adversarial
    if told is None:
        return
    if cfg.engine.kind == "accelerate" and cfg.engine.sharding == "deepspeed":
        raise ConfigError(
            "adversarial asks for gradients of images, which engine.sharding=deepspeed does not give; use ddp or fsdp2"
        )
    if told.split_norms and cfg.engine.recompute:
        raise ConfigError(
            "adversarial.split_norms and engine.recompute exclude each other: what is computed again would pass by the other "
            "norms; leave one of them out"
        )
    if told.split_norms and not told.weight:
        raise ConfigError(
            "adversarial.split_norms=true needs attacked images in the loss: set adversarial.weight above 0"
        )


def _check_detection_settings(cfg: FinetuneConfig) -> None:
    given = {
        "label_smoothing": cfg.label_smoothing,
        "class_weights": cfg.class_weights,
        "data.per_class": cfg.data.per_class,
        "data.holdout_per_class": cfg.data.holdout_per_class,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is for images that have one class each, and data.labels=boxes; leave it out")
    check_pycocotools()
