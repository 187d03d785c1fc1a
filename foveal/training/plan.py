"""What the three stages share: the sections of their configs, and the plan that a config becomes on so many ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import model_validator

from foveal.checkpoint.store import CheckpointConfig
from foveal.config import Config, height_and_width, machine, science
from foveal.data import DataConfig, Dataset, LabelKind, TrainingSet, described, training_set
from foveal.data.image.decode import decoder_name
from foveal.data.sampling.order import rank_slots
from foveal.engines.base import EngineConfig
from foveal.engines.build import check_engine
from foveal.errors import ConfigError, ExportError
from foveal.optim.optimizers import OptimConfig
from foveal.optim.schedule import dropped, plateau_drops, warmup_constant, warmup_cosine
from foveal.tracking.tracker import TrackingConfig
from foveal.training.evaluations import higher_is_better
from foveal.training.rollback import RecoveryConfig
from foveal.weights.export import Card


class BatchConfig(Config):
    """A batch is a number of images, whatever the cluster; accumulation is derived."""

    images: int = science(about="Images per optimizer step, over all ranks.", gt=0)
    at_once: int = machine(64, "The most images that a rank holds in one forward and backward.", gt=0)

    def micros(self, ranks: int) -> tuple[int, int]:
        """(images at once, micros per step) on so many ranks, which divide the batch."""
        mine = self.images // ranks
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
    epochs: int = science(about="How often each image is seen.", ge=1)
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()

    learns: ClassVar[tuple[LabelKind, ...]] = ("class",)

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of what it leaves in export/; an empty one is export/ itself."""
        return ("",)

    @property
    def watched(self) -> str | None:
        """The number of an evaluation that a plateau is judged by; none in a stage that evaluates nothing."""
        return None


@dataclass(frozen=True)
class Plan:
    """What a config comes to on so many ranks: everything that can be known, and refused, before a run begins.

    ``inherited`` is science that no setting states: the digests of the data and of the export that the stage starts
    from, and what that export's card decides. ``resized_from`` is the image size of that export, if it is another.
    """

    cfg: StageConfig
    ranks: int
    dataset: Dataset
    training: TrainingSet
    at_once: int
    micros: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inherited: dict[str, Any] = field(default_factory=dict)
    resized_from: int | tuple[int, int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.training.order.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps from first to last."""
        return self.steps_per_epoch * self.cfg.epochs

    @property
    def runs(self) -> int:
        """How many runs of these steps it comes to: one, if it is no comparison."""
        return 1

    @property
    def stop(self) -> int:
        """The step after which this attempt ends."""
        return min(self.steps, self.cfg.run.stop_at or self.steps)

    def lr(self, step: int, watched: Sequence[float] = ()) -> float:
        """The learning rate of the update that follows ``step`` finished ones.

        ``watched`` are the values of ``cfg.watched`` in the evaluations up to that step, which only a plateau looks at.
        """
        optim = self.cfg.optim
        rise = {
            "peak": optim.peak(self.cfg.batch.images),
            "warmup": round(optim.warmup_epochs * self.steps_per_epoch),
        }
        if optim.schedule == "cosine":
            return warmup_cosine(step, **rise, floor=optim.floor_lr, total=self.steps)
        drops = self._drops(step, watched)
        return dropped(warmup_constant(step, **rise), drops=drops, factor=optim.step_factor, floor=optim.floor_lr)

    def _drops(self, step: int, watched: Sequence[float]) -> int:
        optim, metric = self.cfg.optim, self.cfg.watched
        if optim.schedule == "step":
            return sum(step >= round(epoch * self.steps_per_epoch) for epoch in optim.step_epochs)
        if optim.schedule == "plateau" and metric is not None:
            return plateau_drops(watched, patience=optim.plateau_patience, higher_is_better=higher_is_better(metric))
        return 0

    def science(self) -> dict[str, Any]:
        """What guards a resume."""
        return self.cfg.science() | self.inherited

    def card(self, stage: str, encoder: dict[str, Any], classes: tuple[str, ...], **found: Any) -> Card:
        """The card of what a stage exports: an encoder, with a head for the classes; ``found`` is what the run knows."""
        plain = {"mean": self.mean, "std": self.std, "resized_from": self.resized_from}
        return Card(stage, encoder, **plain, classes=classes, science=self.science(), **found)

    def lines(self) -> list[str]:
        """The plan in words."""
        cfg = self.cfg
        return [
            *self._data_lines(),
            *self._resize_lines(),
            f"batch     {cfg.batch.images} images = {self.ranks} ranks x {self.micros} micros x {self.at_once} at once",
            f"steps     {self.steps} = {cfg.epochs} epochs x {self.steps_per_epoch} (each epoch drops another {self.training.order.dropped} images)",
            f"lr        {cfg.optim.peak(cfg.batch.images):.3g} at its peak, after {cfg.optim.warmup_epochs:g} epochs; {cfg.optim.schedule}, {cfg.optim.kind}",
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
            f"data      {source.dataset.folder}, {source.dataset.samples(source.split):,} images in {source.split}"
            for source in self.training.sources
        ]
        for number, other in enumerate(data.mix, start=1):
            lines[number] += f", {other.share:.4g} of every epoch"
        lines.append(f"decoder   {decoder_name()} for JPEG")
        shards, size = self.training.held(self.cfg.batch.images // self.ranks)
        if shards:
            lines.append(
                f"cache     up to {shards} shards ({size / 1e9:.3g} GB) for a rank's windows, this and the next; "
                f"data.cache.gigabytes={data.cache.gigabytes:g} for all ranks of a node"
            )
        return lines


P = TypeVar("P", bound=Plan)


def config_file(stage: str, given: str) -> Path:
    """The YAML file that a command line means: a path, or NAME for configs/<stage>/NAME.yaml."""
    return Path(given) if given.endswith(".yaml") or "/" in given else Path("configs", stage, f"{given}.yaml")


def inherited_science(facts: dict[str, Any]) -> dict[str, Any]:
    """Science that no setting states, under names that no setting has."""
    return {f"inherited.{name}": value for name, value in facts.items()}


def planned(
    kind: type[P],
    cfg: StageConfig,
    ranks: int,
    *,
    card: Card | None = None,
    origin: dict[str, str] | None = None,
    **further: Any,
) -> P:
    """Open the data, do the arithmetic, and refuse what cannot be.

    ``card`` is that of the export the stage starts from: its pixel statistics are the model's. ``origin`` names the
    digests of such exports, which are science. ``further`` are the fields that a stage's own plan adds.
    Errors: DataError, ConfigError, ExportError.
    """
    _check_labels(cfg)
    dataset = Dataset.open(cfg.data)
    rank_slots(cfg.batch.images, cfg.data.lanes, 0, ranks)
    if ranks > 1 and cfg.data.patience_seconds >= 60 * cfg.engine.timeout_minutes:
        raise ConfigError(
            f"data.patience_seconds={cfg.data.patience_seconds:g} must be below engine.timeout_minutes="
            f"{cfg.engine.timeout_minutes:g}: the other ranks would give up before a loader that hangs is named"
        )
    _check_schedule(cfg)
    training = training_set(dataset, cfg.data, seed=cfg.seed, batch=cfg.batch.images)
    at_once, micros = cfg.batch.micros(ranks)
    check_engine(cfg.engine, cfg.optim, ranks, at_once=at_once, accumulate=micros)
    mean, std = _statistics(cfg, dataset, card)
    facts = {"data": dataset.digest(cfg.data.train), "mean": list(mean), "std": list(std)}
    facts |= described(training.sources) | (origin or {})
    return kind(
        cfg=cfg,
        ranks=ranks,
        dataset=dataset,
        training=training,
        at_once=at_once,
        micros=micros,
        mean=mean,
        std=std,
        inherited=inherited_science(facts),
        **further,
    )


def _check_schedule(cfg: StageConfig) -> None:
    """Refuse a schedule that does not fit into the run. Errors: ConfigError."""
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
    if optim.schedule == "plateau" and cfg.watched is None:
        raise ConfigError(
            "optim.schedule=plateau is of fine-tuning, whose evaluations it follows; take cosine, step or constant here"
        )


def _check_labels(cfg: StageConfig) -> None:
    """What a stage has no use for. Errors: ConfigError."""
    data = cfg.data
    if data.labels not in cfg.learns:
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


def _statistics(cfg: StageConfig, dataset: Dataset, card: Card | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
