"""What the three stages share: the sections of their configs, and the plan that a config becomes on so many ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import model_validator

from foveal.checkpoint.store import CheckpointConfig
from foveal.config import Config, height_and_width, machine, science
from foveal.data import DataConfig, Dataset, LabelKind, TrainingSet, build_training_set, collect_mix_digests
from foveal.data.image.decode import jpeg_decoder_name
from foveal.data.sampling.order import rank_slot_range
from foveal.engines.base import EngineConfig
from foveal.engines.build import check_engine_config
from foveal.errors import ConfigError, ExportError
from foveal.optim.optimizers import OptimConfig
from foveal.optim.schedule import count_plateau_drops, step_decay_lr, warmup_constant, warmup_cosine
from foveal.tracking.tracker import TrackingConfig
from foveal.training.evaluations import higher_is_better
from foveal.training.rollback import RecoveryConfig
from foveal.weights.export import Card


class BatchConfig(Config):
    """A batch is a number of images, whatever the cluster; accumulation is derived."""

    images: int = science(description="Images per optimizer step, over all ranks.", gt=0)
    at_once: int = machine(64, "The most images that a rank holds in one forward and backward.", gt=0)

    def split_into_microbatches(self, world_size: int) -> tuple[int, int]:
        """(images at once, micros per step) on so many ranks, which divide the batch."""
        mine = self.images // world_size
        at_once = max(n for n in range(1, min(self.at_once, mine) + 1) if mine % n == 0)
        return at_once, mine // at_once


class LogConfig(Config):
    """How often a run speaks."""

    every: int = machine(20, "Steps between two deliveries of numbers; every step has its row.", ge=1)
    pictures_every: int = machine(0, "Steps between pictures; 0: only at the end.", ge=0)
    profile_steps: tuple[int, int] | None = machine(
        None, "[first, last]: steps of which rank 0 leaves a trace of torch's profiler in RUN/profile/."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"log.profile_steps={list(self.profile_steps)} must be [first, last], counted from 1")
        return self


class RunConfig(Config):
    """The run directory and how the run is started."""

    dir: str | None = machine(None, "The run directory; none: runs/<name of the config>.")
    fresh: bool = machine(False, "Start anew in a numbered sibling of an existing run directory.")
    stop_at: int | None = machine(None, "Stop after this step, ready to be continued; none: run to the end.", ge=1)
    restarts: int = machine(
        5, "Attempts in a row without a new checkpoint, and without being asked to leave, before a job gives up.", ge=1
    )
    pipeline: str | None = machine(None, "The folder of the pipeline: its stages share one parent run in MLflow.")
    processes: int | None = machine(None, "Processes for --cluster local; none: one per GPU, or one.", ge=1)


class StageConfig(Config):
    """The sections that every stage has."""

    seed: int = science(0, "Of everything that is drawn.", ge=0)
    epochs: int = science(description="How often each image is seen.", ge=1)
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()

    supported_labels: ClassVar[tuple[LabelKind, ...]] = ("class",)

    @property
    def export_names(self) -> tuple[str, ...]:
        """Names of what it leaves in export/; an empty one is export/ itself."""
        return ("",)

    @property
    def plateau_metric(self) -> str | None:
        """The number of an evaluation that a plateau is judged by; none in a stage that evaluates nothing."""
        return None


@dataclass(frozen=True)
class Plan:
    """What a config comes to on so many ranks: everything that can be known, and refused, before a run begins.

    ``inherited`` is science that no setting states: the digests of the data and of the export that the stage starts
    from, and what that export's card decides. ``resized_from`` is the image size of that export, if it is another.
    """

    cfg: StageConfig
    world_size: int
    dataset: Dataset
    training_set: TrainingSet
    microbatch_size: int
    accumulation_steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inherited_science: dict[str, Any] = field(default_factory=dict)
    resized_from: int | tuple[int, int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.training_set.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps from first to last."""
        return self.steps_per_epoch * self.cfg.epochs

    @property
    def num_runs(self) -> int:
        """How many runs of these steps it comes to: one, if it is no comparison."""
        return 1

    @property
    def stop_step(self) -> int:
        """The step after which this attempt ends."""
        return min(self.total_steps, self.cfg.run.stop_at or self.total_steps)

    def compute_lr(self, step: int, metric_history: Sequence[float] = ()) -> float:
        """The learning rate of the update that follows ``step`` finished ones.

        ``watched`` are the values of ``cfg.watched`` in the evaluations up to that step, which only a plateau looks at.
        """
        optim = self.cfg.optim
        peak_lr = optim.peak_lr(self.cfg.batch.images)
        warmup_steps = round(optim.warmup_epochs * self.steps_per_epoch)
        if optim.schedule == "cosine":
            return warmup_cosine(
                step,
                peak_lr=peak_lr,
                min_lr=optim.floor_lr,
                warmup_steps=warmup_steps,
                total_steps=self.total_steps,
            )
        return step_decay_lr(
            warmup_constant(step, peak_lr=peak_lr, warmup_steps=warmup_steps),
            num_drops=self._count_drops(step, metric_history),
            factor=optim.step_factor,
            min_lr=optim.floor_lr,
        )

    def _count_drops(self, step: int, metric_history: Sequence[float]) -> int:
        optim, metric = self.cfg.optim, self.cfg.plateau_metric
        if optim.schedule == "step":
            return sum(step >= round(epoch * self.steps_per_epoch) for epoch in optim.step_epochs)
        if optim.schedule == "plateau" and metric is not None:
            return count_plateau_drops(
                metric_history, patience=optim.plateau_patience, higher_is_better=higher_is_better(metric)
            )
        return 0

    def science_settings(self) -> dict[str, Any]:
        """What guards a resume."""
        return self.cfg.science_settings() | self.inherited_science

    def build_card(
        self, stage_name: str, encoder_card: dict[str, Any], classes: tuple[str, ...], **run_facts: Any
    ) -> Card:
        """The card of what a stage exports: an encoder, with a head for the classes; ``found`` is what the run knows."""
        plain = {"mean": self.mean, "std": self.std, "resized_from": self.resized_from}
        return Card(stage_name, encoder_card, **plain, classes=classes, science=self.science_settings(), **run_facts)

    def summary_lines(self) -> list[str]:
        """The plan in words."""
        cfg = self.cfg
        return [
            *self._data_lines(),
            *self._resize_lines(),
            f"batch     {cfg.batch.images} images = {self.world_size} ranks x {self.accumulation_steps} micros x {self.microbatch_size} at once",
            f"steps     {self.total_steps} = {cfg.epochs} epochs x {self.steps_per_epoch} (each epoch drops another {self.training_set.order.dropped_per_epoch} images)",
            f"lr        {cfg.optim.peak_lr(cfg.batch.images):.3g} at its peak, after {cfg.optim.warmup_epochs:g} epochs; {cfg.optim.schedule}, {cfg.optim.kind}",
            f"engine    {cfg.engine.kind}{f' ZeRO {cfg.engine.zero}' if cfg.engine.kind == 'deepspeed' else ''}, {cfg.engine.precision}",
            f"run       {cfg.run.dir}",
        ]

    def _resize_lines(self) -> list[str]:
        """That weights were trained on images of another size."""
        if self.resized_from is None:
            return []
        was, now = (
            " x ".join(map(str, height_and_width(size))) for size in (self.resized_from, self.cfg.data.image_size)
        )
        return [f"resized   from images of {was} to {now} pixels"]

    def _data_lines(self) -> list[str]:
        """What is read, in which shares, and what of it a node must hold."""
        data = self.cfg.data
        lines = [
            f"data      {source.dataset.folder}, {source.dataset.num_samples(source.split):,} images in {source.split}"
            for source in self.training_set.sources
        ]
        for number, other in enumerate(data.mix, start=1):
            lines[number] += f", {other.share:.4g} of every epoch"
        lines.append(f"decoder   {jpeg_decoder_name()} for JPEG")
        shards, size = self.training_set.cached_size(self.cfg.batch.images // self.world_size)
        if shards:
            lines.append(
                f"cache     up to {shards} shards ({size / 1e9:.3g} GB) for a rank's windows, this and the next; "
                f"data.cache.gigabytes={data.cache.gigabytes:g} for all ranks of a node"
            )
        return lines


PlanT = TypeVar("PlanT", bound=Plan)


def resolve_config_path(stage_name: str, name_or_path: str) -> Path:
    """The YAML file that a command line means: a path, or NAME for configs/<stage>/NAME.yaml."""
    return (
        Path(name_or_path)
        if name_or_path.endswith(".yaml") or "/" in name_or_path
        else Path("configs", stage_name, f"{name_or_path}.yaml")
    )


def add_inherited_prefix(facts: dict[str, Any]) -> dict[str, Any]:
    """Science that no setting states, under names that no setting has."""
    return {f"inherited.{name}": value for name, value in facts.items()}


def build_stage_plan(
    plan_class: type[PlanT],
    cfg: StageConfig,
    world_size: int,
    *,
    source_card: Card | None = None,
    extra_science: dict[str, str] | None = None,
    **plan_fields: Any,
) -> PlanT:
    """Open the data, do the arithmetic, and refuse what cannot be.

    ``card`` is that of the export the stage starts from: its pixel statistics are the model's. ``origin`` names the
    digests of such exports, which are science. ``further`` are the fields that a stage's own plan adds.
    Raises: DataError, ConfigError, ExportError.
    """
    _check_labels(cfg)
    dataset = Dataset.open(cfg.data)
    rank_slot_range(cfg.batch.images, cfg.data.lanes, 0, world_size)
    if world_size > 1 and cfg.data.patience_seconds >= 60 * cfg.engine.timeout_minutes:
        raise ConfigError(
            f"data.patience_seconds={cfg.data.patience_seconds:g} must be below engine.timeout_minutes="
            f"{cfg.engine.timeout_minutes:g}: the other ranks would give up before a loader that hangs is named"
        )
    _check_schedule(cfg)
    training = build_training_set(dataset, cfg.data, seed=cfg.seed, batch_size=cfg.batch.images)
    microbatch_size, accumulation_steps = cfg.batch.split_into_microbatches(world_size)
    check_engine_config(
        cfg.engine, cfg.optim, world_size, microbatch_size=microbatch_size, accumulation_steps=accumulation_steps
    )
    mean, std = _pixel_statistics(cfg, dataset, source_card)
    facts = {"data": dataset.digest(cfg.data.train), "mean": list(mean), "std": list(std)}
    facts |= collect_mix_digests(training.sources) | (extra_science or {})
    return plan_class(
        cfg=cfg,
        world_size=world_size,
        dataset=dataset,
        training_set=training,
        microbatch_size=microbatch_size,
        accumulation_steps=accumulation_steps,
        mean=mean,
        std=std,
        inherited_science=add_inherited_prefix(facts),
        **plan_fields,
    )


def _check_schedule(cfg: StageConfig) -> None:
    """Refuse a schedule that does not fit into the run. Raises: ConfigError."""
    optim, epochs = cfg.optim, list(cfg.optim.step_epochs)
    if bool(epochs) != (optim.schedule == "step"):
        raise ConfigError(
            f"optim.step_epochs={epochs} with optim.schedule={optim.schedule}: the schedule step has epochs, the others none"
        )
    if epochs and not all(a < b for a, b in pairwise([optim.warmup_epochs, *epochs, cfg.epochs])):
        raise ConfigError(
            f"optim.step_epochs={epochs} must ascend between optim.warmup_epochs={optim.warmup_epochs:g} and "
            f"epochs={cfg.epochs}, neither included"
        )
    if optim.schedule == "plateau" and cfg.plateau_metric is None:
        raise ConfigError(
            "optim.schedule=plateau is of fine-tuning, whose evaluations it follows; take cosine, step or constant here"
        )


def _check_labels(cfg: StageConfig) -> None:
    """What a stage has no use for. Raises: ConfigError."""
    data = cfg.data
    if data.labels not in cfg.supported_labels:
        raise ConfigError(
            f"data.labels={data.labels} is for fine-tuning; this stage learns from no such label: leave it out"
        )
    if data.val_size is not None and data.labels not in ("mask", "boxes"):
        raise ConfigError(
            "data.val_size is for labels that are masks or boxes; other images are evaluated as image_size says"
        )
    if data.label_field is not None and data.labels == "class":
        raise ConfigError(
            f"data.label_field={data.label_field} names a member that is no class: set data.labels too, or index the shards "
            f"with --label-key"
        )


def _pixel_statistics(
    cfg: StageConfig, dataset: Dataset, card: Card | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The pixels' mean and deviation that the model was or will be trained with."""
    if card is None:
        return dataset.mean, dataset.std
    for name, stated, hers in (("mean", cfg.data.mean, card.mean), ("std", cfg.data.std, card.std)):
        if stated is not None and stated != hers:
            raise ExportError(
                f"data.{name} is {list(stated)}, the weights were trained with {list(hers)}; leave data.{name} out (null)"
            )
        if len(hers) not in (1, cfg.data.channels):
            raise ExportError(
                f"{name} has {len(hers)} values in the card of the weights, data.channels is {cfg.data.channels}"
            )
    return card.mean, card.std
