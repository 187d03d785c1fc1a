"""The plan that all three stages share: a config resolved for a number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

from foveal.checkpoint.state import check_science_unchanged
from foveal.data.dataset import Dataset
from foveal.data.image.decode import jpeg_decoder_and_version
from foveal.data.image.targets import LabelReader
from foveal.data.sampling.order import rank_slot_range
from foveal.data.sampling.sources import TrainingSet, build_training_set, collect_mix_facts
from foveal.data.sampling.subset import EvalSplit, eval_split, select_subset
from foveal.engines.build import check_engine_config
from foveal.errors import ConfigError, DataError, ExportError
from foveal.optim.schedule import count_plateau_drops, step_decay_lr, warmup_constant_lr, warmup_cosine_lr
from foveal.quantities import format_count
from foveal.training.config import StageConfig
from foveal.training.evaluations import Metric
from foveal.training.lineage import Fork
from foveal.training.plan_lines import checkpoint_line, order_line, resize_lines, warning_lines
from foveal.weights.export import Card
from foveal.weights.pretrained import SourceModel

# In words; what auto means, a start decides.
_COMPILED = {False: "", True: ", compiled", "blocks": ", blocks compiled", "auto": ""}


@dataclass(frozen=True)
class Plan:
    """A config resolved for a number of ranks: everything that can be computed and checked before a run starts.

    ``inherited_science`` is science that no setting states: the digests of the data and of the export that the stage
    starts from, and the values that the export's card determines. ``resized_from``: image size of that export, None if
    it equals this stage's. ``has_source_card``: mean and std are of an export's card. ``source_notes``: sentences about
    weights of others: what was renamed, and where their pixel statistics are from. ``fork``: the run's beginning in
    another run, known once its directory is. ``label_reader`` reads labels that are not in the index.
    ``selection_metric``: the metric, by its logged name, that early stopping and the plateau schedule follow.
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
    has_source_card: bool = False
    source_notes: tuple[str, ...] = ()
    fork: Fork | None = None
    label_reader: LabelReader | None = None
    selection_metric: Metric | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.training_set.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the complete run."""
        return self.steps_per_epoch * self.cfg.epochs

    @property
    def num_runs(self) -> int:
        """The number of runs of ``total_steps`` each; more than 1 for a comparison."""
        return 1

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run itself resumes from checkpoints; otherwise it consists of parts that are not repeated."""
        return True

    @property
    def source_models(self) -> dict[str, SourceModel]:
        """The models that the run starts or learns from, by role: ``init``, ``teacher``, ``arm.<name>``."""
        return {}

    @property
    def evaluated(self) -> EvalSplit | None:
        """The images that the run is evaluated on; None if there is no evaluation."""
        is_evaluated = self.cfg.evaluate_every or not self.cfg.evaluates_knn  # fine-tuning evaluates at its end
        return eval_split(self.cfg.data) if is_evaluated else None

    @property
    def stop_step(self) -> int:
        """The last step of this attempt."""
        return min(self.total_steps, self.cfg.run.stop_at_step or self.total_steps)

    def compute_lr(self, steps_done: int, metric_history: Sequence[float] = ()) -> float:
        """Return the learning rate of the update after ``steps_done`` finished updates.

        ``metric_history``: values of ``selection_metric`` up to that step, for the plateau schedule only.
        """
        optim = self.cfg.optim
        peak_lr = optim.peak_lr(self.cfg.batch.global_size)
        warmup_steps = round(optim.warmup_epochs * self.steps_per_epoch)
        if optim.schedule == "cosine":
            return warmup_cosine_lr(
                steps_done,
                peak_lr=peak_lr,
                min_lr=optim.min_lr,
                warmup_steps=warmup_steps,
                total_steps=self.total_steps,
            )
        num_drops = self._count_drops(steps_done, metric_history)
        lr = warmup_constant_lr(steps_done, peak_lr=peak_lr, warmup_steps=warmup_steps)
        return step_decay_lr(lr, num_drops=num_drops, factor=optim.step_factor, min_lr=optim.min_lr)

    def _count_drops(self, step: int, metric_history: Sequence[float]) -> int:
        optim, metric = self.cfg.optim, self.selection_metric
        if optim.schedule == "step":
            return sum(step >= round(epoch * self.steps_per_epoch) for epoch in optim.step_epochs)
        if optim.schedule == "plateau" and metric is not None:
            return count_plateau_drops(
                metric_history, patience=optim.plateau_patience, higher_is_better=metric.higher_is_better
            )
        return 0

    def science_settings(self) -> dict[str, Any]:
        """Return the settings and inherited facts that must be equal on a resume."""
        return self.cfg.science_settings() | self.inherited_science

    def check_continues(self, saved_science: dict[str, Any], run_or_checkpoint_dir: Path) -> None:
        """Check that this plan has the science of a run or checkpoint. Raises: CheckpointError with every difference."""
        check_science_unchanged(
            saved_science, self.science_settings(), run_or_checkpoint_dir, self.cfg.neutral_values()
        )

    def with_fork(self, fork: Fork) -> Self:
        """Return the plan of a fork: with the digest of its source, and the pixel statistics of its source's weights.

        An export that the stage starts from, and data.mean where it is set, have other statistics and decide.
        """
        mean, std = self.mean, self.std
        if not self.has_source_card and self.cfg.data.mean is None and fork.mean and fork.std:
            mean, std = tuple(fork.mean), tuple(fork.std)
        facts = {"fork": fork.digest, "mean": list(mean), "std": list(std)}
        science = self.inherited_science | add_inherited_prefix(facts)
        return replace(self, fork=fork, mean=mean, std=std, inherited_science=science)

    def build_card(
        self, stage_name: str, encoder_card: dict[str, Any], classes: tuple[str, ...], **card_fields: Any
    ) -> Card:
        """Return the card of an export: an encoder, with a head for ``classes``; ``card_fields``: further fields."""
        return Card(
            stage_name,
            encoder_card,
            mean=self.mean,
            std=self.std,
            resized_from=self.resized_from,
            classes=classes,
            science=self.science_settings() | (self.fork.card_facts() if self.fork else {}),
            **card_fields,
        )

    def summary_lines(self) -> list[str]:
        """Return the plan as lines of text."""
        cfg, optim, engine, images = self.cfg, self.cfg.optim, self.cfg.engine, self.cfg.batch.global_size
        ranks, microbatches = format_count(self.world_size, "rank"), format_count(self.accumulation_steps, "microbatch")
        num_dropped = self.training_set.order.dropped_per_epoch
        dropped = (
            f" (each epoch drops {format_count(num_dropped, 'image')}, different ones each time)" if num_dropped else ""
        )
        warm_up = (
            f"after {format_count(optim.warmup_epochs, 'epoch')}" if optim.warmup_epochs else "from the first step"
        )
        peak = f"{optim.peak_lr(images):.3g} at its peak, {warm_up}"
        zero = f" ZeRO {engine.zero}" if engine.kind == "deepspeed" else ""
        return [
            *self._data_lines(),
            *resize_lines(self.resized_from, cfg.data.image_size),
            *(f"weights   {note}" for note in self.source_notes),
            f"batch     {images} images = {ranks} x {microbatches} x {format_count(self.microbatch_size, 'image')}",
            order_line(self.training_set.order, cfg.data.window),
            f"steps     {self.total_steps} = {format_count(cfg.epochs, 'epoch')} x {self.steps_per_epoch}{dropped}",
            f"lr        {peak}; {optim.schedule}, {optim.name}",
            *warning_lines(cfg, self.world_size, self.microbatch_size),
            *self._validation_lines(),
            f"engine    {engine.kind}{zero}, {engine.precision}{_COMPILED[engine.compile]}",
            checkpoint_line(cfg.checkpoint),
            f"run       {cfg.run.dir} (logs/, metrics.jsonl)",
            *self._fork_lines(),
        ]

    def _fork_lines(self) -> list[str]:
        """Return lines about the run's beginning in another run: the source, its schedule from there, what differs."""
        if self.fork is None:
            return []
        source_line, changes_line = self.fork.summary_lines()
        step = self.fork.start_step
        rate = "" if self.cfg.optim.schedule == "plateau" else f", learning rate {self.compute_lr(step):.3g} there"
        return [source_line, f"start     after step {step} of {self.total_steps}{rate}", changes_line]

    def _validation_lines(self) -> list[str]:
        """Return a line if the run is evaluated while it trains."""
        if not self.cfg.evaluate_every:
            return []
        evaluated = eval_split(self.cfg.data)
        subset = select_subset(
            self.dataset, self.cfg.data, split=evaluated.split, subset=evaluated.subset, seed=self.cfg.seed
        )
        images = f"{len(subset):,} images of {evaluated.split}"
        without_knn = "" if self._can_evaluate_knn(evaluated.split) else "; the loss only, because k-NN needs labels"
        return [f"evaluate  every {self.cfg.evaluate_every} steps and at the end: {images}{without_knn}"]

    def _can_evaluate_knn(self, split: str) -> bool:
        """Return whether evaluations compare labelled images of training and of a split, or are no business of k-NN."""
        if not self.cfg.evaluates_knn:
            return True
        splits = (self.cfg.data.train, split)
        return self.dataset.classes is not None and all((self.dataset.labels(name) >= 0).any() for name in splits)

    def _data_lines(self) -> list[str]:
        """Return lines about the data sets, their fractions of an epoch, the JPEG decoder and the shard cache."""
        data = self.cfg.data
        lines = []
        for source, used in zip(self.training_set.sources, self.training_set.order.source_sizes, strict=True):
            images = source.dataset.num_samples(source.split)
            share = f", {used:,} of them used" if used < images else ""
            lines.append(f"data      {source.dataset.folder}, {images:,} images in {source.split}{share}")
        for number, mix_entry in enumerate(data.mix, start=1):
            lines[number] += f", {mix_entry.fraction:.4g} of every epoch"
        lines.append(f"decoder   {jpeg_decoder_and_version()} for JPEG")
        shards, size = self.training_set.required_shards_and_bytes(self.cfg.batch.global_size // self.world_size)
        if shards:
            lines.append(
                f"cache     up to {shards} shards ({size / 1e9:.3g} GB) for a rank's windows, this and the next; "
                f"data.cache.max_gigabytes={data.cache.max_gigabytes:g} for all ranks of a node"
            )
        return lines


PlanT = TypeVar("PlanT", bound=Plan)


def add_inherited_prefix(facts: dict[str, Any]) -> dict[str, Any]:
    """Prefix the names of science that no setting states, so that no name equals a setting's."""
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
    """Open the data, derive the sizes of a run, and raise an error for any setting that cannot work.

    ``source_card``: card of the export that the stage starts from, whose pixel statistics apply. ``extra_science``: the
    digests of such exports. ``plan_fields``: fields that the stage's plan class adds.
    Raises: DataError, ConfigError, ExportError.
    """
    _check_data_settings(cfg)
    dataset = Dataset.open(cfg.data)
    rank_slot_range(cfg.batch.global_size, cfg.data.lanes or 1, 0, world_size)
    if world_size > 1 and cfg.data.stall_timeout_seconds >= 60 * cfg.engine.timeout_minutes:
        raise ConfigError(
            f"data.stall_timeout_seconds={cfg.data.stall_timeout_seconds:g} must be below engine.timeout_minutes="
            f"{cfg.engine.timeout_minutes:g}: the other ranks would give up before a loader that hangs is named"
        )
    _check_schedule(cfg)
    if cfg.evaluate_every:
        check_evaluation_data(cfg, dataset)
    training = build_training_set(
        dataset, cfg.data, seed=cfg.seed, batch_size=cfg.batch.global_size, num_ranks=world_size
    )
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"lanes": training.order.num_lanes})})
    microbatch_size, accumulation_steps = cfg.batch.microbatch_size_and_count(world_size)
    check_engine_config(
        cfg.engine, cfg.optim, world_size, microbatch_size=microbatch_size, accumulation_steps=accumulation_steps
    )
    mean, std = _pixel_statistics(cfg, dataset, source_card)
    facts = {"data": dataset.samples_digest(cfg.data.train), "mean": list(mean), "std": list(std)}
    facts |= collect_mix_facts(training.sources) | (extra_science or {})
    if dataset.manifest.bit_depth is not None:
        facts["bit_depth"] = dataset.manifest.bit_depth
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
        has_source_card=source_card is not None,
        **plan_fields,
    )


def _check_schedule(cfg: StageConfig) -> None:
    """Raise ConfigError for a schedule that does not fit into the run."""
    optim, epochs = cfg.optim, list(cfg.optim.step_epochs)
    if epochs and not all(earlier < later for earlier, later in pairwise([optim.warmup_epochs, *epochs, cfg.epochs])):
        raise ConfigError(
            f"optim.step_epochs={epochs} must ascend between optim.warmup_epochs={optim.warmup_epochs:g} and "
            f"epochs={cfg.epochs}, neither included"
        )


def check_evaluation_data(cfg: StageConfig, dataset: Dataset) -> None:
    """Raise ConfigError if there is nothing to evaluate on, DataError if a label is no class."""
    split = eval_split(cfg.data).split
    try:
        dataset.num_samples(split)
    except DataError as error:
        subject = f"evaluate_every={cfg.evaluate_every}" if cfg.evaluate_every else "the evaluation at the end"
        remedy = "set evaluate_every=0" if cfg.evaluates_knn else "cross-validate (cross_validation.count=3)"
        raise ConfigError(
            f"{subject} needs images to evaluate on: {error}; pack the images with a split for it (data.val), or {remedy}"
        ) from None
    if dataset.classes and cfg.evaluates_knn:
        for labelled_split in (cfg.data.train, split):
            dataset.labels(labelled_split)


def _check_data_settings(cfg: StageConfig) -> None:
    """Raise ConfigError for data settings that the stage does not use."""
    for name in cfg.refused_data_settings:
        if getattr(cfg.data, name) is not None:
            raise ConfigError(f"data.{name} is for fine-tuning, by tasks such as segmentation: leave it out")


def _pixel_statistics(
    cfg: StageConfig, dataset: Dataset, card: Card | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that normalise pixels: the card's if there is a card, else the data's."""
    if card is None:
        return dataset.mean, dataset.std
    for name, setting, card_values in (("mean", cfg.data.mean, card.mean), ("std", cfg.data.std, card.std)):
        if setting is not None and setting != card_values:
            raise ExportError(
                f"data.{name} is {list(setting)}, the weights were trained with {list(card_values)}; leave data.{name} "
                f"out (null)"
            )
        if len(card_values) not in (1, cfg.data.channels):
            raise ExportError(
                f"{name} has {len(card_values)} values in the card of the weights, data.channels is {cfg.data.channels}"
            )
    return card.mean, card.std
