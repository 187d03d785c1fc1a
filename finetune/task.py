"""What fine-tuning asks of a task, and the plan of a run. Each task is one object of one module in ``finetune/tasks/``.

No other module distinguishes tasks: a new one is a subclass of ``Task`` and a line in ``finetune/tasks/registry.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from finetune.config import FinetuneConfig
from finetune.evaluation_details import EvaluationDetails
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import LabelReader
from foveal.data.sampling.subset import EvalSplit, SubsetName
from foveal.engines.base import Engine
from foveal.errors import ConfigError
from foveal.inference.exported_model import ExportedModel, build_exported_encoder
from foveal.inference.image_transform import ImageFrame
from foveal.inference.predictions import Columns, Prediction
from foveal.inspect.image_grid import draw_image_grid
from foveal.models.backbone import BackboneCard, build_meta_backbone, has_batch_norm, parse_encoder_card
from foveal.models.config import Pooling
from foveal.quantities import format_count
from foveal.training.evaluations import Metric
from foveal.training.lineage import Fork
from foveal.training.loop import TrainingSetup
from foveal.training.plan import Plan
from foveal.training.run import Run
from foveal.weights.pretrained import PretrainedSource, SourceModel

# Settings that not every task supports, by dotted name, and what they are for. ``Task.supported_settings`` selects.
TASK_SETTINGS = {
    "mixup": "is for images with classes",
    "cutmix": "is for images with classes",
    "random_erasing": "is for images with classes",
    "dropout": "is for images with classes",
    "ema_decay": "is for images with classes",
    "teacher": "is for images with one class",
    "adversarial": "is for images with one class",
    "probe": "reads one class of an image",
    "class_weights": "is for classes of images or pixels",
    "label_smoothing": "is for classes of images or pixels",
    "pooling": "is of tasks that read one feature of an image",
    "data.samples_per_class": "is for images that have one class each",
    "data.holdout_per_class": "is for images that have one class each",
    "data.fold": "is cut class by class",
    "data.augment.rand_augment.ops": "transforms images but not labels within them",
    "data.eval_size": "is for labels within images; other images are evaluated as data.image_size says",
    "data.label_field": "names a member with the label; `foveal data index --label-key` reads a class from another one",
}


@dataclass(frozen=True)
class FinetunePlan(Plan):
    """Plan with the task, the card of the encoder to build, the classes, and the sources of pretrained weights.

    ``arms``: of a comparison, the sources of the arms that start from weights, by ``arm.<name>``.
    ``classes`` and ``class_weights`` are empty for a task without classes. ``label_lines`` say what the labels hold.
    """

    cfg: FinetuneConfig
    task: "Task" = None  # type: ignore[assignment]
    encoder: dict[str, Any] = None  # type: ignore[assignment]
    classes: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()
    init_source: PretrainedSource | None = None
    teacher: PretrainedSource | None = None
    arms: Mapping[str, PretrainedSource] = field(default_factory=dict)
    label_lines: tuple[str, ...] = ()

    @property
    def source_models(self) -> dict[str, SourceModel]:
        sources = {**self.arms, "init": self.init_source, "teacher": self.teacher}
        return {
            role: SourceModel(source.path, source.card.sha256, source.card)
            for role, source in sources.items()
            if source is not None
        }

    @property
    def evaluated(self) -> EvalSplit | None:
        """The images of evaluations; of a cross-validation all folds together."""
        has_folds = self.cfg.cross_validation is not None
        return EvalSplit("fold", self.cfg.data.train, "all") if has_folds else super().evaluated

    @property
    def num_runs(self) -> int:
        """Number of nested runs; 1 without trials and folds."""
        trials, folds = self.cfg.trials, self.cfg.cross_validation
        if folds is not None:
            return folds.count * folds.repeats
        return 1 if trials is None else len(trials.arms) * len(trials.lr_per_256) * trials.repeats

    @property
    def has_checkpoints(self) -> bool:
        cfg = self.cfg
        return cfg.trials is None and cfg.cross_validation is None and cfg.probe is None

    def with_fork(self, fork: Fork) -> Self:
        """Return the plan of a fork. Raises: ConfigError if its pixel statistics are not the teacher's."""
        plan = super().with_fork(fork)
        if self.teacher is not None and (self.teacher.card.mean, self.teacher.card.std) != (plan.mean, plan.std):
            raise ConfigError(
                f"run.fork={fork.setting} and teacher exclude each other: their pixel statistics differ; set data.mean "
                f"and data.std to the teacher's"
            )
        return plan

    def _validation_lines(self) -> list[str]:
        return [] if self.cfg.cross_validation is not None else super()._validation_lines()

    @property
    def backbone(self) -> BackboneCard | None:
        """The card of the timm backbone; None if the plan builds one of foveal's encoders."""
        card = parse_encoder_card(self.encoder, "model")
        return card if isinstance(card, BackboneCard) else None

    @property
    def trains_sincos_positions(self) -> bool:
        """Whether the encoder's positions start as a sine-cosine table and are trained."""
        cfg = self.cfg
        is_trained = cfg.train_sincos_positions and not cfg.freeze_encoder and cfg.probe is None
        return is_trained and self.encoder.get("positions") == "sincos"

    @property
    def exported_encoder(self) -> dict[str, Any]:
        """The card of the trained encoder, for its export: positions that were trained are no formula any more."""
        return self.encoder | ({"positions": "learned"} if self.trains_sincos_positions else {})

    @property
    def has_batch_norm(self) -> bool:
        """Whether the backbone has BatchNorm, which couples the samples of a microbatch."""
        card = self.backbone
        return card is not None and has_batch_norm(build_meta_backbone(*card.build_args, card.classes))

    def summary_lines(self) -> list[str]:
        folds = self.cfg.cross_validation
        fold_lines = (
            []
            if folds is None
            else [
                f"folds     {folds.count} folds x {format_count(folds.repeats, 'repeat')} = {self.num_runs} runs like this"
            ]
        )
        task_lines = self.task.summary_lines(self.cfg)
        own_lines = [*self._norm_lines(), *self.label_lines, *task_lines, *fold_lines, *self._trial_lines()]
        return [*super().summary_lines(), *own_lines]

    def _trial_lines(self) -> list[str]:
        trials = self.cfg.trials
        if trials is None:
            return []
        counts = ((len(trials.arms), "arm"), (len(trials.lr_per_256), "rate"), (trials.repeats, "seed"))
        product = " x ".join(format_count(*pair) for pair in counts)
        return [f"trials    {product} = {format_count(self.num_runs, 'run')} like this; trials.lr_per_256 replaces lr"]

    def _norm_lines(self) -> list[str]:
        """Warn that BatchNorm makes the loss curve depend on microbatch size and number of ranks."""
        if self.cfg.freeze_encoder or not self.has_batch_norm:
            return []
        cause = "BatchNorm normalizes over a microbatch"
        settings = f"the number of ranks and on batch.max_micro_size ({self.microbatch_size} images here)"
        return [f"norm      {cause}: the curve depends on {settings}"]


class Task(ABC):
    """A kind of label, and everything that fine-tuning does because of it.

    name: value of the setting ``task``.
    predicts_classes: whether the outputs are the classes that the manifest names.
    min_classes: classes that there must be, if the task predicts classes: 2 where it tells classes apart.
    has_index_labels: whether the label is the one class of an image that the index holds.
    supported_settings: those of ``TASK_SETTINGS`` that the task supports; it refuses the others.
    settings_section: section of ``FinetuneConfig`` that only this task reads, such as ``segment``.
    prediction_columns: of the table that `foveal predict` writes; without any the command refuses the task.
    prediction_files: kinds of PNG files that a prediction has beside the table, such as "mask".
    """

    name: ClassVar[str]
    predicts_classes: ClassVar[bool] = False
    min_classes: ClassVar[int] = 1
    has_index_labels: ClassVar[bool] = False
    supported_settings: ClassVar[frozenset[str]] = frozenset()
    settings_section: ClassVar[str | None] = None
    prediction_columns: ClassVar[Columns] = {}
    prediction_files: ClassVar[tuple[str, ...]] = ()

    # --- labels ---

    @abstractmethod
    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader | None:
        """Return the reader of a data set's labels; None if they are those of the index.

        The reader applies the crop and the flip of an image to its label; ``foveal data verify`` and ``show`` use it too.
        Raises: DataError if the data set has no such labels.
        """

    # --- settings ---

    def resolve_pooling(self, cfg: FinetuneConfig) -> Pooling:
        """Return the encoder's pooling. A head that reads all tokens needs "token", which normalizes every token."""
        return cfg.pooling

    def check_settings(self, cfg: FinetuneConfig) -> None:  # noqa: B027 - most tasks have nothing to check
        """Raise ConfigError if settings that the task supports do not fit each other or the machine."""

    def check_model(self, plan: FinetunePlan) -> None:  # noqa: B027
        """Raise ConfigError if a forward of the plan's model would fail, in training or in evaluation."""

    def summary_lines(self, cfg: FinetuneConfig) -> list[str]:
        """Return lines for the printed plan, for example on how evaluation sees an image."""
        return []

    # --- model ---

    @abstractmethod
    def build(self, plan: FinetunePlan, device: torch.device) -> TrainingSetup[Any]:
        """Return model, parameter groups and objective; frozen modules are on the device. Seeds with the plan's seed."""

    def num_encoder_outputs(self, classes: tuple[str, ...]) -> int:
        """Return the outputs of the encoder's own head; 0 if the task's head is outside the encoder."""
        return 0

    @abstractmethod
    def head_card(self, plan: FinetunePlan) -> dict[str, Any] | None:
        """Return the card of the head outside the encoder, its ``kind`` first; None if there is no such head.

        An export holds a head that has a card: the weights of the model's module ``head``.
        """

    def model_from_export(self, export_dir: Path) -> nn.Module:
        """Return the exported model, in evaluation mode on the CPU; tasks with a head card build its head.

        Raises: ExportError.
        """
        return build_exported_encoder(export_dir).eval()

    # --- evaluation ---

    @abstractmethod
    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        """Return the metrics that every evaluation has, by which early stopping may select."""

    @abstractmethod
    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        """Return at least the values of ``metrics`` on a subset of a split after a step, each sample once.

        Every rank must call it.
        """

    def compute_metrics_and_details(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> tuple[dict[str, float], EvaluationDetails | None]:
        """Return ``compute_metrics``, and what the run's end shows of this evaluation; None: nothing.

        Every rank must call it. With early stopping every evaluation comes from here: details must cost next to nothing
        until they are collected.
        """
        return self.compute_metrics(engine, run, step, split=split, subset=subset), None

    # --- predictions ---

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        """Return the predictions of normalised images [B, C, H, W] on the model's device, by evaluation's own code.

        ``frames``: the place of each input in its image. ``top``: the most rows of an image; None: as the task sees fit.
        """
        raise ConfigError(f"task={self.name} predicts nothing for a table")

    def draw_prediction(self, model: ExportedModel, pixels: Tensor, prediction: Prediction) -> Any:
        """Return a Pillow image of an input, uint8 [C, H, W], with its prediction; here with its rows as title."""
        rows = (
            " ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            for row in prediction.rows
        )
        return draw_image_grid({"": pixels[None]}, title=", ".join(rows))
