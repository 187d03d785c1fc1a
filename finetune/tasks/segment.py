"""Semantic segmentation: the segmenter that a plan builds, and its pixel-wise cross-entropy.

Pixels without a label are ignored. B images of H x W pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import FinetuneConfig, SegmentConfig
from finetune.evaluation_details import EvaluationDetails
from finetune.model import encoder_for_dense_head, model_from_export, param_groups_from_plan
from finetune.task import FinetunePlan, Task
from finetune.tasks.segment_details import SegmentationDetails
from finetune.tasks.segment_metrics import compute_segmentation_metrics
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.masks import MaskReader
from foveal.data.image.targets import NO_CLASS, LabelReader, require_class_names, resolve_label_field
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import ConfigError
from foveal.inference.exported_model import ExportedModel
from foveal.inference.image_transform import ImageFrame
from foveal.inference.predictions import Columns, Prediction, round_float32
from foveal.inspect.segmentation import draw_predicted_mask, encode_mask, outside_id
from foveal.models.backbone import format_image_size
from foveal.models.config import Pooling
from foveal.models.droppath import count_drop_paths
from foveal.models.segment import Segmenter, build_segmenter, check_segmenter_training
from foveal.models.sliding_window import iter_sliding_window_log_probs, window_top_lefts
from foveal.seeding import derive_key, draw_uniform
from foveal.training.evaluations import Metric
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run


@dataclass(frozen=True)
class SegmentationLoss:
    """Pixel-wise softmax cross-entropy, weighted by ``class_weights`` [K], on the host.

    Drop path is keyed by (seed, epoch, sample id), not by rank.
    """

    seed: int
    label_smoothing: float
    num_drop_paths: int
    mean: Sequence[float]
    std: Sequence[float]
    class_weights: Tensor

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return the sum of the class weights of all labelled pixels."""
        targets = _targets_of(batch)
        counts = torch.bincount(targets[targets != NO_CLASS], minlength=len(self.class_weights))
        return (counts * self.class_weights.double()).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets_BHW = normalise(batch.images, self.mean, self.std), _targets_of(batch).long()
        drop_noise = draw_uniform(derive_key(self.seed, "drop path"), batch.sample_keys, self.num_drop_paths)
        logits_BKHW = model(images, drop_noise).float()
        weights = self.class_weights.to(logits_BKHW.device, non_blocking=True)
        losses_BHW = F.cross_entropy(
            logits_BKHW,
            targets_BHW,
            weight=weights,
            ignore_index=NO_CLASS,
            reduction="none",  # the reduction inside cross_entropy sums pixels in no fixed order on a GPU
            label_smoothing=self.label_smoothing,
        )
        predictions_BHW = logits_BKHW.argmax(dim=1)
        correct_BHW = (predictions_BHW == targets_BHW) * weights[predictions_BHW]
        return losses_BHW.sum(), {"train_pixel_accuracy": correct_BHW.sum()}


def segmenter_from_plan(plan: FinetunePlan) -> Segmenter:
    """Return the plan's encoder or backbone with a newly initialized segmentation head."""
    return build_segmenter(encoder_for_dense_head(plan), plan.encoder, _head_card(plan), plan.cfg.init or "model")


def segmenter_from_export(export_dir: Path) -> Segmenter:
    """Return an exported segmenter, in evaluation mode on the CPU. Raises: ExportError."""
    return model_from_export(export_dir, "segmentation", build_segmenter)


def _targets_of(batch: Batch) -> Tensor:
    """Return the masks of a batch, int16 [B, H, W]."""
    assert batch.targets is not None, "task=segmentation reads masks as targets"
    return batch.targets


def _head_card(plan: FinetunePlan) -> dict[str, Any]:
    return plan.cfg.segment.head_card(len(plan.classes)).to_dict()


class Segmentation(Task):
    """A class for every pixel, from a mask; the head is outside the encoder and reads every patch."""

    name = "segmentation"
    predicts_classes = True
    min_classes = 2
    supported_settings = frozenset(
        {
            "label_smoothing",
            "class_weights",
            "data.samples_per_class",
            "data.holdout_per_class",
            "data.eval_size",
            "data.label_field",
        }
    )
    settings_section = "segment"
    prediction_columns: ClassVar[Columns] = {"class": str, "fraction": float}
    prediction_files = ("mask",)

    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader:
        field = resolve_label_field(cfg, dataset, "mask.png", self.name)
        classes = require_class_names(dataset)
        _check_ignore_id(cfg, classes, dataset.folder)
        return MaskReader(field, classes, cfg.ignore_id, cfg.decode_version)

    def resolve_pooling(self, cfg: FinetuneConfig) -> Pooling:
        return "token"

    def check_settings(self, cfg: FinetuneConfig) -> None:
        """Raise ConfigError if an evaluated image is smaller than a window."""
        if any(val < side for val, side in zip(cfg.data.eval_image_hw, cfg.data.image_hw, strict=True)):
            raise ConfigError(
                f"data.eval_size is {format_image_size(cfg.data.eval_image_hw)} and data.image_size "
                f"{format_image_size(cfg.data.image_hw)}: an evaluated image must hold at least one window of image_size"
            )

    def check_model(self, plan: FinetunePlan) -> None:
        if plan.backbone is not None:
            size = max(2, plan.microbatch_size) if plan.cfg.freeze_encoder else plan.microbatch_size
            check_segmenter_training(plan.backbone, plan.cfg.segment.head_card(len(plan.classes)), size)

    def summary_lines(self, cfg: FinetuneConfig) -> list[str]:
        windows = len(window_top_lefts(cfg.data.eval_image_hw, cfg.data.image_hw, cfg.segment.stride))
        line = format_evaluated_area(cfg.data)
        return [f"{line}, in {windows} windows of {format_image_size(cfg.data.image_hw)}" if windows > 1 else line]

    def build(self, plan: FinetunePlan, device: torch.device) -> TrainingSetup[SegmentationLoss]:
        model = segmenter_from_plan(plan)
        cfg, weights = plan.cfg, torch.tensor(plan.class_weights)
        objective = SegmentationLoss(
            cfg.seed, cfg.label_smoothing, count_drop_paths(model), plan.mean, plan.std, weights
        )
        return TrainingSetup(model, param_groups_from_plan(plan, model), objective)

    def head_card(self, plan: FinetunePlan) -> dict[str, Any]:
        return _head_card(plan)

    def model_from_export(self, export_dir: Path) -> nn.Module:
        return segmenter_from_export(export_dir)

    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        return (
            Metric("miou", higher_is_better=True),
            Metric("pixel_accuracy", higher_is_better=True),
            Metric("loss", higher_is_better=False),
        )

    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        return compute_segmentation_metrics(engine, run, step, split=split, subset=subset)

    def compute_metrics_and_details(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> tuple[dict[str, float], EvaluationDetails | None]:
        assert isinstance(run.plan, FinetunePlan)
        details = SegmentationDetails(run.plan.classes)
        metrics = compute_segmentation_metrics(engine, run, step, split=split, subset=subset, details=details)
        return metrics, details

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        stride = model.settings.get("segment.stride", SegmentConfig().stride)
        log_probs = iter_sliding_window_log_probs(model.module, images, model.trained_hw, stride)
        return [
            _describe_mask(log_probs_KHW.argmax(dim=0).cpu(), model.classes, frame, top)
            for log_probs_KHW, frame in zip(log_probs, frames, strict=True)
        ]

    def draw_prediction(self, model: ExportedModel, pixels: Tensor, prediction: Prediction) -> Any:
        return draw_predicted_mask(pixels, prediction.drawn, model.classes)


def _describe_mask(ids_HW: Tensor, classes: tuple[str, ...], frame: ImageFrame, top: int | None) -> Prediction:
    """Return the classes of an image by their share of the input, and the mask of the whole image."""
    shares = torch.bincount(ids_HW.flatten(), minlength=len(classes)) / ids_HW.numel()
    order = shares.argsort(descending=True, stable=True)[: int((shares > 0).sum())][:top].tolist()
    rows = tuple({"class": classes[label], "fraction": round_float32(float(shares[label]))} for label in order)
    ids = frame.ids_to_image(ids_HW.numpy(), outside_id(len(classes)))
    return Prediction(rows, files={"mask": encode_mask(ids, len(classes))}, drawn=ids_HW)


def format_evaluated_area(data: DataConfig) -> str:
    """Return a line of the printed plan: what part of an image is evaluated, at what size."""
    crop = (
        "whole images"
        if data.eval_crop_ratio == 1
        else f"the middle of images (data.eval_crop_ratio={data.eval_crop_ratio:g})"
    )
    return f"measured  on {crop}, as {format_image_size(data.eval_image_hw)} pixels"


def _check_ignore_id(cfg: DataConfig, classes: tuple[str, ...], folder: str) -> None:
    """Raise ConfigError if the default of ``data.ignore_id`` is the id of a class, whose pixels would be left out."""
    number = cfg.ignore_id
    if number is not None and number < len(classes) and "ignore_id" not in cfg.model_fields_set:
        raise ConfigError(
            f"data.ignore_id={number} is the default, and the id of class '{classes[number]}' of the {len(classes)} classes "
            f"of {folder}: set data.ignore_id=null, the id of pixels without a class, or {number} to leave that class out"
        )
