"""The settings of fine-tuning."""

from typing import Literal

from finetune.early_stopping import EarlyStoppingConfig
from finetune.probe.config import ProbeConfig
from foveal.config import Config, machine, science
from foveal.engines.base import EngineConfig
from foveal.models.detect import DetectionHeadCard, DetectorConfig
from foveal.models.segment import SegmentationHeadCard, SegmentationHeadKind
from foveal.models.vit import Pooling, VitConfig
from foveal.training.plan import StageConfig


class FinetuneEngine(EngineConfig):
    """Accelerate, or one process."""

    kind: Literal["accelerate", "plain"] = machine("accelerate", "The library behind the update; plain is one process.")


class TrialsConfig(Config):
    """A fair comparison of ways to start: every arm gets the same labels, steps, augmentation and learning rates."""

    arms: dict[str, str | None] = machine(
        description="Name of each way to start: its export folder, or null for from scratch.", min_length=1
    )
    lr_per_256: tuple[float, ...] = science(
        description="Learning rates; each arm keeps its own best on the held-out part of train.", min_length=1
    )
    repeats: int = science(3, "Seeds: each draws other labels, another order and another head.", ge=1)


class AdversarialConfig(Config):
    """Training on attacked images beside the clean ones, and accuracy under the same attack (Madry et al., 2018)."""

    kind: Literal["fgsm", "pgd"] = science(
        "pgd", "fgsm: one step as long as epsilon; pgd: several from a random place."
    )
    epsilon: float = science(4.0, "The most that a pixel changes, in 255ths.", gt=0, le=255)
    step: float = science(1.0, "What one step of pgd changes, in 255ths.", gt=0)
    iterations: int = science(5, "Steps of pgd.", ge=1)
    weight: float = science(0.5, "Share of the attacked images in the loss; 0: only accuracy under attack.", ge=0, le=1)
    split_norms: bool = science(
        False, "BatchNorm keeps statistics and weights of its own for attacked images (AdvProp)."
    )


class TeacherConfig(Config):
    """A teacher beside the labels: Hinton et al., 2015 (soft), or DeiT's (Touvron et al., 2021), with its token or without."""

    init: str = machine(description="The export of a classifier of the same classes. What is in it is science.")
    kind: Literal["soft", "hard", "token"] = science(
        "soft", "Learn the teacher's softened logits, or its guess; or a distillation token learns the guess (DeiT)."
    )
    weight: float = science(0.5, "Share of the teacher in the loss; the labels have the rest.", gt=0, le=1)
    temperature: float = science(3.0, "What logits are divided by, for soft.", gt=0)


class FoldsConfig(Config):
    """Cross-validation: every part of data.train is once what the training on the others is judged on."""

    count: int = science(description="Folds: parts of data.train, and runs, of a repeat.", ge=2)
    repeats: int = science(1, "Seeds: each cuts other folds, and draws another order and another head.", ge=1)


class DetectConfig(DetectorConfig):
    """What stands on the encoder where labels are boxes, and what is told of it."""

    each_class: bool = machine(False, "Tell the average precision of every class too, as ap_NAME.")

    def head_card(self, num_classes: int) -> DetectionHeadCard:
        """What builds the pyramid and head of so many classes."""
        return DetectionHeadCard(width=self.width, layers=self.layers, strides=self.strides, classes=num_classes)


class SegmentConfig(Config):
    """What stands on the encoder where labels are masks, and how images larger than image_size are evaluated."""

    head: SegmentationHeadKind = science(
        "linear", "A linear map of the last map's places, or a light pyramid of maps of several resolutions."
    )
    width: int = science(128, "Numbers per place of the pyramid's maps.", ge=1)
    stride: float = science(
        0.5, "Where val_size is larger: from one window of image_size to the next, as a share of its side.", gt=0, le=1
    )

    def head_card(self, num_classes: int) -> SegmentationHeadCard:
        """What builds the head of so many classes."""
        return SegmentationHeadCard(head=self.head, width=self.width, classes=num_classes)


class FinetuneConfig(StageConfig):
    """A model with labels, from an export or from scratch: a classifier, or what data.labels makes of it."""

    supported_labels = ("class", "classes", "mask", "boxes")

    engine: FinetuneEngine = FinetuneEngine()
    init: str | None = machine(None, "The export folder to start from; none: from scratch. What is in it is science.")
    init_name: str | None = science(
        None, "Timm's name of an init that is no export: a safetensors file then, or a folder with one."
    )
    model: VitConfig | None = science(
        None, "The encoder from scratch; with init its card decides, and this must agree."
    )
    backbone: str | None = science(
        None, "Any model of timm as it is, from scratch; instead of model, and with init it must agree."
    )
    pooling: Pooling = science(
        "avg", "What the head reads: the mean of the patches, or the class token; a backbone has its own."
    )
    drop_path: float = science(0.0, "Stochastic depth at the last block, growing linearly from 0.", ge=0, lt=1)
    label_smoothing: float = science(0.0, "Share of the target spread over all classes.", ge=0, lt=1)
    dropout: float = science(0.0, "Share of the features before the head that is dropped.", ge=0, lt=1)
    mixup: float = science(0.0, "Beta(a, a) of mixup's weights; 0: none.", ge=0, le=1)
    cutmix: float = science(0.0, "Beta(a, a) of the area that cutmix leaves; 0: none.", ge=0, le=1)
    cutmix_share: float = science(0.5, "Share of the images that get cutmix, where there is mixup too.", ge=0, le=1)
    erase: float = science(0.0, "Probability that a box of an image is erased with noise.", ge=0, le=1)
    class_weights: Literal["balanced"] | tuple[float, ...] | None = science(
        None, "Weights of the classes in the loss, by label; balanced: one over their frequency, 1 on average."
    )
    average: float | None = science(
        None,
        "What a running average of the weights keeps of itself in a step; it is evaluated and exported.",
        gt=0,
        lt=1,
    )
    frozen: bool = science(False, "Only the head learns.")
    adversarial: AdversarialConfig | None = science(None, "Train on attacked images too.")
    teacher: TeacherConfig | None = science(None, "Learn from a teacher too.")
    evaluate_every: int = machine(0, "Steps between evaluations on data.val; 0: only at the end.", ge=0)
    segment: SegmentConfig = SegmentConfig()
    detect: DetectConfig = DetectConfig()
    trials: TrialsConfig | None = science(None, "Compare ways to start instead of one run.")
    early_stopping: EarlyStoppingConfig | None = science(
        None,
        "Judge the evaluations on the way; none: the last step is what a run leaves. evaluate_every is science then.",
    )
    folds: FoldsConfig | None = science(None, "Cross-validate on data.train, not one run; data.val is left alone.")
    probe: ProbeConfig | None = science(None, "Read the frozen encoder's features instead of training it.")

    @property
    def plateau_metric(self) -> str | None:
        return None if self.early_stopping is None else self.early_stopping.metric
