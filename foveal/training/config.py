"""The config sections that all three stages share."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import PrivateAttr, model_validator

from foveal.checkpoint.config import CheckpointConfig
from foveal.config import Config, machine, science
from foveal.data.config import DataConfig
from foveal.data.sampling.lanes import fitting_lanes
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.rules import Rule, excludes, explain_first_broken, requires
from foveal.tracking.tracker import TrackingConfig

_log = logging.getLogger(__name__)


class BatchConfig(Config):
    """The batch size, independent of the number of ranks; gradient accumulation is derived from it."""

    global_size: int = science(description="Images per optimizer step, over all ranks.", gt=0)
    max_micro_size: int = machine(64, "Maximal microbatch size: images per forward and backward of a rank.", gt=0)

    def microbatch_size_and_count(self, world_size: int) -> tuple[int, int]:
        """Return (images per microbatch, microbatches per step); ``world_size`` must divide the batch."""
        rank_images = self.global_size // world_size
        sizes = range(1, min(self.max_micro_size, rank_images) + 1)
        microbatch_size = max(size for size in sizes if rank_images % size == 0)
        return microbatch_size, rank_images // microbatch_size


class LogConfig(Config):
    """Intervals of logging, images and profiler traces, and the report."""

    every: int = machine(20, "Steps between two writes of metrics; each write has a row for every step.", ge=1)
    images_every: int = machine(
        0,
        "Pretraining: steps between saved reconstructions; 0: only at the end of the run. Other stages ignore it.",
        ge=0,
    )
    final_pictures: bool = machine(
        True,
        "At the end of the run, save pictures of the training images and of the exported encoder: features, attention, "
        "activations.",
    )
    node_metrics: bool = machine(
        True,
        "Record the use of every node (processors, memory, disks, network, GPUs) in RUN/nodes.jsonl and MLflow's system "
        "metrics.",
    )
    profile_steps: tuple[int, int] | None = machine(
        None, "[first, last] step, counted from 1, that rank 0 profiles into RUN/profile/. null: no trace."
    )
    report: bool = machine(True, "Write RUN/report.html, and that of run.pipeline, when the run is finished.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"log.profile_steps={list(self.profile_steps)} must be [first, last], counted from 1")
        return self


class RecoveryConfig(Config):
    """The limits at which a run rolls back to its newest checkpoint and at which it gives up."""

    rollback_after_skips: int = science(
        3,
        "Refused updates in a row after which the run rolls back to its newest checkpoint and skips their batches.",
        ge=1,
    )
    max_rollbacks: int = machine(5, "Maximal number of roll-backs before the run gives up.", ge=0)


class CardConfig(Config):
    """Texts for the model card (README.md) of the exports, under Hugging Face's names; null: not stated."""

    license: str | None = machine(None, "Licence of the weights: Hugging Face's identifier, such as apache-2.0.")
    license_name: str | None = machine(None, "Name of a licence that Hugging Face has no identifier of.")
    license_link: str | None = machine(None, "Where the text of that licence is: a link, or a file in the folder.")
    developers: str | None = machine(None, "Who made the model.")
    model_description: str | None = machine(None, "What the model is for, as plain text.")


class RunConfig(Config):
    """The run directory, and the start and stop of a run."""

    dir: str | None = machine(None, "Run directory. null: runs/<name of the config>.")
    fresh: bool = machine(False, "Start a new run in a numbered sibling if the run directory exists.")
    fork: str | None = machine(
        None,
        "Begin a new run from a checkpoint of another one under other science: RUN (its newest) or RUN@STEP. The digest "
        "of the checkpoint is science. null: no fork.",
    )
    stop_at_step: int | None = machine(
        None, "Stop after this step with a checkpoint to resume from. null: run to the end.", ge=1
    )
    max_attempts_without_progress: int = machine(
        5,
        "Attempts in a row without a step beyond the furthest reached, preemptions aside, before the job gives up.",
        ge=1,
    )
    pipeline: str | None = machine(
        None, "Folder of the pipeline, whose stages share one parent run in MLflow. null: no pipeline."
    )
    processes: int | None = machine(None, "Processes for --cluster local. null: one per GPU, or one in all.", ge=1)


NO_PLATEAU_SCHEDULE = excludes(
    "optim.schedule=plateau",
    because="the schedule follows early_stopping.metric, which only fine-tuning has",
    remedy="use cosine, step or constant here",
)


class StageConfig(Config):
    """The settings that every stage has, and the ``rules`` of their combinations; a stage adds its own."""

    seed: int = science(0, "Seed of all random numbers.", ge=0)
    epochs: int = science(description="Number of passes over the training images.", ge=1)
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate_every: int = machine(
        0, "Steps between evaluations on data.val; the last step is evaluated too. 0: no evaluation.", ge=0
    )
    log: LogConfig = LogConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    card: CardConfig = CardConfig()

    main_settings: ClassVar[tuple[str, ...]] = (  # those that --help shows; a stage puts its own before them
        "data.path",
        "data.image_size",
        "epochs",
        "batch.global_size",
        "batch.max_micro_size",
        "optim.lr_per_256",
        "optim.warmup_epochs",
        "optim.weight_decay",
        "engine.kind",
        "engine.precision",
        "data.workers",
        "evaluate_every",
        "checkpoint.every",
        "run.dir",
        "seed",
    )
    refused_data_settings: ClassVar[tuple[str, ...]] = ("eval_size", "label_field")  # they are for tasks of fine-tuning
    rules: ClassVar[tuple[Rule, ...]] = (
        requires(
            "optim.schedule=step",
            "optim.step_epochs",
            because="the learning rate drops after these epochs",
            remedy="set optim.step_epochs, or use another schedule",
        ),
        requires(
            "optim.step_epochs",
            "optim.schedule=step",
            because="no other schedule drops the learning rate after given epochs",
            remedy="remove optim.step_epochs, or set optim.schedule=step",
        ),
        requires(
            "engine.sharding!=ddp",
            "engine.kind=accelerate",
            because="no other engine reads it (DeepSpeed shards by engine.zero)",
            remedy="remove engine.sharding, or set engine.kind=accelerate",
        ),
        excludes(
            "card.license",
            "card.license_name",
            because="license_name is for a licence that Hugging Face has no identifier of",
            remedy="set one of them",
        ),
        requires(
            "card.license_link",
            "card.license_name",
            because="an identifier says where the text of its licence is",
            remedy="set card.license_name, or remove card.license_link",
        ),
        requires(
            "data.mean", "data.std", because="they replace the manifest's as a pair", remedy="set both or neither"
        ),
        requires(
            "data.std", "data.mean", because="they replace the manifest's as a pair", remedy="set both or neither"
        ),
    )

    _overridden: frozenset[str] = PrivateAttr(frozenset())  # names of the settings that the command line states

    @classmethod
    def load(cls, file: Path, overrides: Sequence[str] = (), on_warning: Callable[[str], None] = _log.warning) -> Self:
        """Read the settings, as ``Config.load``; the file's lanes are left out if an override's batch does not fit them."""
        cfg = super().load(file, overrides, on_warning)
        names = frozenset(override.partition("=")[0] for override in overrides)
        has_new_batch = any(name.partition(".")[0] == "batch" for name in names)
        lanes = None if names & {"data", "data.lanes"} else cfg.data.lanes
        if has_new_batch and lanes is not None and lanes not in fitting_lanes(cfg.batch.global_size):
            cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"lanes": None})})
        return cfg.record_overrides(names)

    def record_overrides(self, names: frozenset[str]) -> Self:
        """Remember the settings that the command line states, and return these settings."""
        self._overridden = names
        return self

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if refusal := explain_first_broken(self.rules, self):
            raise ValueError(refusal)
        return self

    evaluates_knn: ClassVar[bool] = True  # evaluations compare features by the classes of the index

    @property
    def export_subfolders(self) -> tuple[str, ...]:
        """The names of the exports, subfolders of export/; the empty name is export/ itself."""
        return ("",)

    @property
    def early_stopping_metric(self) -> str | None:
        """The evaluation metric that the plateau schedule follows; None in a stage without evaluations."""
        return None
