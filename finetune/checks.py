"""What the settings of fine-tuning cannot mean together, each in one sentence."""

from finetune.config import FinetuneConfig
from foveal.data import LabelKind
from foveal.errors import ConfigError

_CLASSIFIES: tuple[LabelKind, ...] = ("class", "classes")
_OF_CLASSES = ("mixup", "cutmix", "erase", "dropout", "class_weights", "adversarial", "average")


def check_settings(cfg: FinetuneConfig) -> None:
    """What the settings alone tell. Errors: ConfigError."""
    kind = cfg.data.labels
    default = FinetuneConfig.model_construct()
    if kind not in _CLASSIFIES:
        for name in _OF_CLASSES:
            if getattr(cfg, name) != getattr(default, name):
                raise ConfigError(f"{name} is for images with classes, and data.labels is {kind}; leave it out")
    if kind in ("mask", "boxes") and cfg.data.augment.operations:
        raise ConfigError(
            f"data.augment.operations moves what images show and not their {kind}; leave it out with data.labels={kind}"
        )
    if kind != "class" and cfg.teacher is not None:
        raise ConfigError(f"teacher is for images with one class, and data.labels is {kind}; leave one of them out")
    if kind != "class" and cfg.class_weights == "balanced":
        raise ConfigError(
            "class_weights=balanced counts classes in the index, which has none of data.labels=classes; give a list of weights"
        )
    if cfg.frozen and cfg.drop_path:
        raise ConfigError(
            f"drop_path={cfg.drop_path:g} is for an encoder that learns, and frozen=true keeps it from it"
        )
    _check_adversarial(cfg)


def check_pairs(cfg: FinetuneConfig, at_once: int) -> None:
    """Mixup and cutmix pair the images of a micro. Errors: ConfigError."""
    if (cfg.mixup or cfg.cutmix) and at_once % 2:
        raise ConfigError(
            f"mixup and cutmix pair images that a rank holds at once, which are {at_once} here: take an even number of "
            f"images a rank (batch.images, batch.at_once)"
        )


def check_norms(cfg: FinetuneConfig, model: str, *, there: bool) -> None:
    """Whether there are norms to be split. Errors: ConfigError."""
    if cfg.adversarial is not None and cfg.adversarial.split_norms and not there:
        raise ConfigError(f"adversarial.split_norms is for BatchNorm, which {model} does not have; leave it out")


def _check_adversarial(cfg: FinetuneConfig) -> None:
    told = cfg.adversarial
    if told is None:
        return
    if cfg.engine.kind == "accelerate" and cfg.engine.sharding == "deepspeed":
        raise ConfigError(
            "adversarial asks for gradients of images, which engine.sharding=deepspeed does not give; use ddp or fsdp2"
        )
    if told.split_norms and not told.weight:
        raise ConfigError(
            "adversarial.split_norms=true needs attacked images in the loss: set adversarial.weight above 0"
        )
