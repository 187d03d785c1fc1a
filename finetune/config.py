"""The settings of fine-tuning."""

from typing import Literal

from foveal.config import Config, machine, science
from foveal.distributed.engine import EngineConfig
from foveal.models.detect import DetectorSizes
from foveal.models.segment import SegmentHead
from foveal.models.vit import Pooling, VitConfig
from foveal.stage import StageConfig


class FinetuneEngine(EngineConfig):
    """Accelerate, or one process."""

    kind: Literal["accelerate", "plain"] = machine("accelerate", "The library behind the update; plain is one process.")


class TrialsConfig(Config):
    """A fair comparison of ways to start: every arm gets the same labels, steps, augmentation and learning rates."""

    arms: dict[str, str | None] = machine(
        about="Name of each way to start: its export folder, or null for from scratch.", min_length=1
    )
    lr_per_256: tuple[float, ...] = science(
        about="Learning rates; each arm keeps its own best on the held-out part of train.", min_length=1
    )
    repeats: int = science(3, "Seeds: each draws other labels, another order and another head.", ge=1)


class DetectConfig(DetectorSizes):
    """What stands on the encoder where labels are boxes, and what is told of it."""

    each_class: bool = machine(False, "Tell the average precision of every class too, as ap_NAME.")


class SegmentConfig(Config):
    """What stands on the encoder where labels are masks, and how images larger than image_size are evaluated."""

    head: SegmentHead = science(
        "linear", "A linear map of the last map's places, or a light pyramid of maps of several resolutions."
    )
    width: int = science(128, "Numbers per place of the pyramid's maps.", ge=1)
    stride: float = science(
        0.5, "Where val_size is larger: from one window of image_size to the next, as a share of its side.", gt=0, le=1
    )


class FinetuneConfig(StageConfig):
    """A model with labels, from an export or from scratch: a classifier, or what data.labels makes of it."""

    engine: FinetuneEngine = FinetuneEngine()
    init: str | None = machine(None, "The export folder to start from; none: from scratch. What is in it is science.")
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
    evaluate_every: int = machine(0, "Steps between evaluations on data.val; 0: only at the end.", ge=0)
    segment: SegmentConfig = SegmentConfig()
    detect: DetectConfig = DetectConfig()
    trials: TrialsConfig | None = science(None, "Compare ways to start instead of one run.")
