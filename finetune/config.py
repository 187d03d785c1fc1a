"""Settings of fine-tuning."""

from typing import Any, Literal, Self

from finetune.probe.config import ProbeConfig
from foveal.config import Config, machine, science
from foveal.engines.config import EngineConfig
from foveal.models.config import (
    DetectionHeadCard,
    DetectorConfig,
    Pooling,
    SegmentationHeadCard,
    SegmentationHeadKind,
    VitConfig,
)
from foveal.rules import excludes, requires
from foveal.training.config import StageConfig

ErasedBoxes = Literal["inside", "clipped"]


class FinetuneEngine(EngineConfig):
    """Settings of the engine: Accelerate, or plain PyTorch in one process."""

    kind: Literal["accelerate", "plain"] = machine("accelerate", "The training engine; plain is one process.")


class TrialsConfig(Config):
    """A comparison of initializations: every arm gets the same labels, steps, augmentation and learning rates."""

    arms: dict[str, str | None] = machine(
        description="Initializations by name: an export folder, or null for training from scratch.", min_length=1
    )
    lr_per_256: tuple[float, ...] = science(
        description="Learning rates to try; each arm uses its best on the holdout part of data.train.", min_length=1
    )
    repeats: int = science(
        3, "Number of seeds; each has its own labelled subset, sample order and head initialization.", ge=1
    )


class AdversarialConfig(Config):
    """Adversarial training beside clean images, and accuracy under the same attack (Madry et al., 2018)."""

    attack: Literal["fgsm", "pgd"] = science(
        "pgd", "The attack. fgsm: one step of length epsilon; pgd: several steps from a random start."
    )
    epsilon: float = science(4.0, "Largest change of a pixel, in 1/255.", gt=0, le=255)
    step_size: float = science(1.0, "Change of a pixel in one step of pgd, in 1/255.", gt=0)
    steps: int = science(5, "Steps of pgd.", ge=1)
    weight: float = science(
        0.5, "Weight of the attacked images in the loss; 0: only measure accuracy under attack.", ge=0, le=1
    )
    separate_batchnorm: bool = science(
        False, "Separate BatchNorm statistics and weights for attacked images (AdvProp)."
    )


class TeacherConfig(Config):
    """Distillation beside the labels: soft targets (Hinton et al., 2015), or hard ones (DeiT, Touvron et al., 2021)."""

    init: str = machine(
        description="Export folder of a classifier with the same classes. The digest of its weights is science."
    )
    kind: Literal["soft", "hard", "token"] = science(
        "soft",
        "Target. soft: the teacher's softened logits; hard: its predicted class; token: its predicted class, learned "
        "by a distillation token (DeiT).",
    )
    weight: float = science(0.5, "Weight of the teacher in the loss; the labels have the rest.", gt=0, le=1)
    temperature: float = science(3.0, "Temperature that divides the logits, for soft.", gt=0)


class CrossValidationConfig(Config):
    """Cross-validation: each fold of data.train evaluates one training on the remaining folds."""

    count: int = science(description="Folds of data.train; each repeat has one run per fold.", ge=2)
    repeats: int = science(1, "Number of seeds; each has its own folds, sample order and head initialization.", ge=1)


class EarlyStoppingConfig(Config):
    """Early stopping by an evaluation metric; the run exports the weights of its best evaluation."""

    metric: str = science(
        description="Metric to select by, such as val_top1 or holdout_loss; the task says whether higher is better."
    )
    patience: int | None = science(
        description="Evaluations without improvement after which the run stops; null: the run trains to the end.",
        ge=1,
    )


class DetectConfig(DetectorConfig):
    """Settings of the detection head and its metrics."""

    each_class: bool = machine(False, "Log the average precision of each class too, as ap_NAME.")

    def head_card(self, num_classes: int) -> DetectionHeadCard:
        """Return the card of the pyramid and head for this number of classes."""
        return DetectionHeadCard(width=self.width, layers=self.layers, strides=self.strides, classes=num_classes)


class SegmentConfig(Config):
    """Settings of the segmentation head and of its sliding-window evaluation."""

    head: SegmentationHeadKind = science(
        "linear", "linear: a linear layer on the last feature map; pyramid: a light multi-scale feature pyramid."
    )
    width: int = science(128, "Channels of the pyramid's feature maps.", ge=1)
    stride: float = science(
        0.5,
        "Stride of the sliding window where data.eval_size exceeds image_size, as a fraction of image_size.",
        gt=0,
        le=1,
    )

    def head_card(self, num_classes: int) -> SegmentationHeadCard:
        """Return the card of the head for this number of classes."""
        return SegmentationHeadCard(head=self.head, width=self.width, classes=num_classes)


_FORK_IS_ONE_RUN = "a fork is one run that goes on from another run's checkpoint"
_WHOLE_RUNS = "each of its runs trains to the last step"


class FinetuneConfig(StageConfig):
    """Settings of supervised training, from an export or from scratch."""

    refused_data_settings = ()  # each task refuses what it does not read

    task: str = science("classification", "What is learned: classification, multilabel, segmentation or detection.")
    engine: FinetuneEngine = FinetuneEngine()
    init: str | None = machine(
        None, "Export folder to start from; null: from scratch. The digest of its weights is science."
    )
    init_name: str | None = science(
        None, "timm model name of init where init is weights of others (safetensors or of torch.save), not an export."
    )
    model: VitConfig | None = science(
        None, "The encoder to train from scratch; with init it must equal the export's card, or be null."
    )
    backbone: str | None = science(
        None, "timm model to train from scratch instead of model; with init it must equal the export's, or be null."
    )
    pooling: Pooling = science(
        "avg", "Input of the head: mean of the patch tokens, or the class token; a timm backbone has its own pooling."
    )
    drop_path: float = science(
        0.0, "Stochastic depth rate of the last block; increases linearly from 0 over the blocks.", ge=0, lt=1
    )
    label_smoothing: float = science(
        0.0, "Label smoothing: fraction of the target that is spread over all classes.", ge=0, lt=1
    )
    dropout: float = science(0.0, "Dropout rate of the features before the head.", ge=0, lt=1)
    mixup: float = science(0.0, "Parameter a of mixup's Beta(a, a) weights; 0: no mixup.", ge=0, le=1)
    cutmix: float = science(0.0, "Parameter a of the Beta(a, a) area that cutmix keeps; 0: no cutmix.", ge=0, le=1)
    mixup_switch_prob: float = science(0.5, "Fraction of the images with cutmix where mixup is on too.", ge=0, le=1)
    random_erasing: float = science(0.0, "Probability of random erasing: a box of the image becomes noise.", ge=0, le=1)
    random_erasing_boxes: ErasedBoxes = science(
        "inside",
        "Erased boxes. inside: a box that exceeds the image is drawn again, as in timm; clipped: it is cut at the "
        "edges, as before 0.2.",
        since="0.2",
        neutral="clipped",
    )
    class_weights: Literal["balanced"] | tuple[float, ...] | None = science(
        None,
        "Class weights in the loss, in label order; balanced: inverse class frequency, 1 on average; null: all 1.",
    )
    ema_decay: float | None = science(
        None, "EMA decay of the weights; the EMA is evaluated and exported. null: no EMA.", gt=0, lt=1
    )
    freeze_encoder: bool = science(False, "Freeze the encoder and train only the head.")
    train_sincos_positions: bool = science(
        True,
        "Train sine-cosine positions like the other weights, as MAE's fine-tuning does; false: they stay fixed. Learned "
        "positions are trained in either case.",
        since="0.2",
        neutral=False,
    )
    adversarial: AdversarialConfig | None = science(None, "Adversarial training; null: none.")
    teacher: TeacherConfig | None = science(None, "Distillation from a teacher beside the labels; null: none.")
    evaluate_every: int = machine(0, "Steps between evaluations on data.val; 0: only at the end.", ge=0)
    segment: SegmentConfig = SegmentConfig()
    detect: DetectConfig = DetectConfig()
    trials: TrialsConfig | None = science(None, "Compare initializations; null: a single run.")
    early_stopping: EarlyStoppingConfig | None = science(
        None,
        "Export the best evaluation instead of the last step, and optionally stop early; null: off. With it, "
        "evaluate_every is science.",
    )
    cross_validation: CrossValidationConfig | None = science(
        None, "Cross-validation on data.train, without data.val; null: a single run."
    )
    probe: ProbeConfig | None = science(None, "Probe the frozen encoder's features; null: train the encoder.")

    evaluates_knn = False
    alternatives = ("model", "backbone")
    main_settings = ("task", "init", "model", "backbone", "trials", *StageConfig.main_settings)
    rules = (
        *StageConfig.rules,
        excludes(
            "freeze_encoder=true",
            "drop_path>0",
            because="stochastic depth is for an encoder that is trained",
            remedy="leave one of them out",
        ),
        excludes(
            "adversarial",
            "engine.sharding=deepspeed",
            because="attacks need gradients of images, which Accelerate's DeepSpeed does not give",
            remedy="use engine.sharding=ddp or fsdp2",
        ),
        excludes(
            "adversarial.separate_batchnorm=true",
            "engine.activation_checkpointing=true",
            because="the recomputation in the backward pass would use the clean images' norms",
            remedy="leave one of them out",
        ),
        requires(
            "adversarial.separate_batchnorm=true",
            "adversarial.weight>0",
            because="the separate norms are of attacked images in the loss",
            remedy="set adversarial.weight above 0",
        ),
        excludes(
            "cross_validation",
            "trials",
            because="a cross-validation has one initialization",
            remedy="cross-validate the arm that a comparison has chosen",
        ),
        excludes("cross_validation", "run.stop_at_step", because=_WHOLE_RUNS, remedy="shorten epochs"),
        excludes(
            "cross_validation",
            "data.fold",
            because="cross_validation sets data.fold for each of its runs",
            remedy="leave one of them out",
        ),
        excludes("cross_validation", "run.fork", because=_FORK_IS_ONE_RUN, remedy="leave one of them out"),
        excludes("trials", "run.stop_at_step", because=_WHOLE_RUNS, remedy="shorten epochs"),
        excludes("trials", "init", because="trials.arms says what each arm starts from", remedy="leave init out"),
        excludes("trials", "run.fork", because=_FORK_IS_ONE_RUN, remedy="leave one of them out"),
        requires(
            "trials.lr_per_256>1",
            "data.holdout_per_class>0",
            because="the best of several rates is chosen on the holdout",
            remedy="set data.holdout_per_class, or give one rate",
        ),
        excludes("probe", "trials", because="a probe trains no encoder", remedy="leave one of them out"),
        excludes("probe", "cross_validation", because="a probe trains no encoder", remedy="leave one of them out"),
        excludes("probe", "run.fork", because=_FORK_IS_ONE_RUN, remedy="leave one of them out"),
        excludes("probe", "data.fold", because="a probe is evaluated on data.val", remedy="leave data.fold out"),
        excludes("probe", "run.stop_at_step", because="its heads are trained to the end", remedy="shorten epochs"),
        excludes("probe", "data.mix", because="features are those of data.path alone", remedy="leave data.mix out"),
    )

    def without_replaced_model(self) -> Self:
        """Return the settings without model and backbone, if an ``init`` on the command line may replace the file's."""
        stated = {name.partition(".")[0] for name in self._overridden}
        is_replaceable = "init" in stated and stated.isdisjoint(self.alternatives)
        return self.model_copy(update=dict.fromkeys(self.alternatives)) if is_replaceable else self

    def from_nested(self, values: dict[str, Any], source: str) -> Self:
        """Return the settings of a nested run, as ``from_dict``, by the rules of this run's command line."""
        return self.from_dict(values, source).record_overrides(self._overridden)

    @property
    def early_stopping_metric(self) -> str | None:
        """The metric of schedule=plateau."""
        return None if self.early_stopping is None else self.early_stopping.metric
