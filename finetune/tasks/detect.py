"""Object detection: the detector that a plan builds, and its objective on images with and without boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.config import FinetuneConfig
from finetune.evaluation_details import EvaluationDetails
from finetune.model import encoder_for_dense_head, model_from_export, param_groups_from_plan
from finetune.task import FinetunePlan, Task
from finetune.tasks.average_precision import check_pycocotools
from finetune.tasks.detect_details import MIN_DRAWN_SCORE
from finetune.tasks.detect_metrics import (
    DETECTION_LIMITS,
    compute_detection_metrics,
    compute_detection_metrics_and_details,
)
from finetune.tasks.segment import format_evaluated_area
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.boxes import BoxReader
from foveal.data.image.targets import LabelReader, require_class_names, resolve_label_field
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.inference.exported_model import ExportedModel
from foveal.inference.image_transform import ImageFrame
from foveal.inference.predictions import Columns, Prediction, Row, round_float32
from foveal.inspect.boxes import draw_boxes
from foveal.inspect.image_grid import draw_image_grid
from foveal.models.backbone import parse_encoder_card
from foveal.models.config import Pooling
from foveal.models.detect import Detector, build_detector, check_detector_meta_forward
from foveal.models.droppath import count_drop_paths
from foveal.models.fcos import Detections, decode_detections, fcos_losses_per_image
from foveal.seeding import derive_key, draw_uniform
from foveal.training.evaluations import Metric
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_BOX_COLUMNS = ("left", "top", "width", "height")  # pixels


@dataclass(frozen=True)
class DetectionLoss:
    """FCOS losses, normalized per image by its number of positive locations.

    The loss is a mean over images, so that the batch weight does not depend on the boxes, and the split of a step into
    ranks and microbatches does not matter. The paper divides by the positive locations of the batch, so that an image
    with many objects weighs more.
    """

    seed: int
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of images."""
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None, "task=detection reads targets"
        drop_noise = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        losses = fcos_losses_per_image(model(normalise(batch.images, self.mean, self.std), drop_noise), batch.targets)
        class_loss, box_loss, centre_loss = (loss_B.sum() for loss_B in losses)
        return class_loss + box_loss + centre_loss, {
            "class_loss": class_loss,
            "box_loss": box_loss,
            "centre_loss": centre_loss,
        }


def detector_from_plan(plan: FinetunePlan) -> Detector:
    """Return the plan's encoder (see ``encoder_for_dense_head``) with a newly initialized pyramid and head."""
    return build_detector(encoder_for_dense_head(plan), plan.encoder, _head_card(plan), plan.cfg.init or "model")


def detector_from_export(export_dir: Path) -> Detector:
    """Return an exported detector, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "detection", build_detector)


def _head_card(plan: FinetunePlan) -> dict[str, Any]:
    return plan.cfg.detect.head_card(len(plan.classes)).to_dict()


class Detection(Task):
    """Objects and their boxes, from COCO annotations; the head is outside the encoder and reads every patch."""

    name = "detection"
    predicts_classes = True
    supported_settings = frozenset({"data.eval_size", "data.label_field"})
    settings_section = "detect"
    prediction_columns: ClassVar[Columns] = {"class": str, "score": float} | dict.fromkeys(_BOX_COLUMNS, float)

    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader:
        field = resolve_label_field(cfg, dataset, "json", self.name)
        return BoxReader(field, require_class_names(dataset), cfg.decode_version)

    def resolve_pooling(self, cfg: FinetuneConfig) -> Pooling:
        return "token"

    def check_settings(self, cfg: FinetuneConfig) -> None:
        """Raise ConfigError if pycocotools is missing."""
        check_pycocotools()

    def check_model(self, plan: FinetunePlan) -> None:
        data, head = plan.cfg.data, plan.cfg.detect.head_card(len(plan.classes))
        encoder = parse_encoder_card(plan.encoder, "model")
        check_detector_meta_forward(encoder, head, data.image_hw, plan.microbatch_size, train=True)
        check_detector_meta_forward(encoder, head, data.eval_image_hw, 1, train=False)

    def summary_lines(self, cfg: FinetuneConfig) -> list[str]:
        return [format_evaluated_area(cfg.data)]

    def build(self, plan: FinetunePlan, device: torch.device) -> TrainingSetup[DetectionLoss]:
        model = detector_from_plan(plan)
        objective = DetectionLoss(plan.cfg.seed, count_drop_paths(model), plan.mean, plan.std)
        return TrainingSetup(model, param_groups_from_plan(plan, model), objective)

    def head_card(self, plan: FinetunePlan) -> dict[str, Any]:
        return _head_card(plan)

    def model_from_export(self, export_dir: Path) -> nn.Module:
        return detector_from_export(export_dir)

    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        return (
            Metric("mAP", higher_is_better=True),
            Metric("mAP_50", higher_is_better=True),
            Metric("mAP_75", higher_is_better=True),
            Metric("loss", higher_is_better=False),
        )

    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        return compute_detection_metrics(engine, run, step, split=split, subset=subset)

    def compute_metrics_and_details(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> tuple[dict[str, float], EvaluationDetails | None]:
        return compute_detection_metrics_and_details(engine, run, step, split=split, subset=subset)

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        image_hw = (images.shape[2], images.shape[3])
        detections = decode_detections(model.module(images), image_hw, **DETECTION_LIMITS)
        return [
            _describe_boxes(of_image, model.classes, frame, image_hw, top)
            for of_image, frame in zip(detections, frames, strict=True)
        ]

    def draw_prediction(self, model: ExportedModel, pixels: Tensor, prediction: Prediction) -> Any:
        """Return an input with the boxes that evaluation draws, too."""
        boxes = prediction.drawn[prediction.drawn[:, 5] >= MIN_DRAWN_SCORE]
        return draw_image_grid({"predicted": draw_boxes(pixels[None], [boxes], model.classes)}, min_side=1)


def _describe_boxes(
    detections: Detections, classes: tuple[str, ...], frame: ImageFrame, image_hw: tuple[int, int], top: int | None
) -> Prediction:
    """Return the boxes of an image, best first, in pixels of the whole image; JSON has the keys of COCO's results."""
    boxes, scores, labels = (values.cpu()[:top] for values in (detections.boxes, detections.scores, detections.classes))
    rows, json_rows = list[Row](), list[dict[str, Any]]()
    for box, score, label in zip(
        frame.boxes_to_image(boxes, image_hw).tolist(), scores.tolist(), labels.tolist(), strict=True
    ):
        left, top_side, right, bottom = box
        bbox = [round_float32(side) for side in (left, top_side, right - left, bottom - top_side)]
        rows.append(
            {"class": classes[label], "score": round_float32(score)} | dict(zip(_BOX_COLUMNS, bbox, strict=True))
        )
        json_rows.append({"category_id": label, "class": classes[label], "bbox": bbox, "score": round_float32(score)})
    drawn = torch.cat([boxes, labels[:, None].float(), scores[:, None]], dim=1).numpy()
    return Prediction(tuple(rows), tuple(json_rows), drawn=drawn)
