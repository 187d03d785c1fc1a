"""Plan of a probe, and every check before it starts."""

import functools
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.probe.config import HYPERPARAMETERS, ProbeConfig, ProbeKind
from finetune.task import FinetunePlan
from foveal.atomic import format_bytes
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.errors import ConfigError
from foveal.models.backbone import infer_pooled_width
from foveal.models.config import ResolvedVitConfig

FileShapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # shape and dtype by file name


@dataclass(frozen=True)
class ProbePlan(FinetunePlan):
    """Plan of probes on a frozen encoder."""

    @property
    def probe(self) -> ProbeConfig:
        """The settings of the probe."""
        assert self.cfg.probe is not None
        return self.cfg.probe

    @property
    def kind_layer_pairs(self) -> list[tuple[ProbeKind, int]]:
        """All pairs of probe kind and layer; each pair is one unit of work."""
        return [(kind, layer) for kind in dict.fromkeys(self.probe.kinds) for layer in self.layers]

    @property
    def layers(self) -> tuple[int, ...]:
        """The probed blocks, from 1; (0,) for the pooled feature of a timm backbone."""
        return (0,) if self.backbone else self.probe.resolve_layer_numbers(self.encoder["depth"])

    @property
    def subsets(self) -> dict[str, tuple[str, SubsetName]]:
        """Split and subset of the probe's data, by name: train, holdout (if configured), val."""
        data = self.cfg.data
        subsets: dict[str, tuple[str, SubsetName]] = {"train": (data.train, "train")}
        if data.holdout_per_class:
            subsets["holdout"] = (data.train, "holdout")
        subsets["val"] = (data.val, "all")
        return subsets

    @cached_property
    def image_counts(self) -> dict[str, int]:
        """Number of images by subset name."""
        data = self.cfg.data
        return {
            name: len(select_subset(self.dataset, data, split=split, subset=subset, seed=self.cfg.seed))
            for name, (split, subset) in self.subsets.items()
        }

    @property
    def file_shapes(self) -> FileShapes:
        """Shape and dtype of each feature file by name."""
        layers, (width, patches) = len(self.layers), self._token_sizes
        shapes: FileShapes = {}
        for name, images in self.image_counts.items():
            shapes[f"{name}-labels.npy"] = (images,), np.int64
            if self.probe.reads_pooled:
                shapes[f"{name}-pooled.npy"] = (layers, images, self.feature_dim), np.float32
            if self.probe.reads_patches:
                shapes[f"{name}-patches.npy"] = (layers, images, patches, width), np.float16
        return shapes

    @property
    def feature_dim(self) -> int:
        """Dimensions of a pooled feature."""
        return self._token_sizes[0] * (2 if self.probe.features == "both" else 1)

    @property
    def _token_sizes(self) -> tuple[int, int]:
        """Width of a token, and number of patches (0 for a timm backbone)."""
        if self.backbone:
            return infer_pooled_width(*self.backbone.build_args), 0
        sizes = ResolvedVitConfig.model_validate({name: self.encoder[name] for name in ResolvedVitConfig.model_fields})
        rows, columns = sizes.patch_grid(self.cfg.data.image_size)
        return sizes.width, rows * columns

    @property
    def feature_files_bytes(self) -> int:
        """Size of all feature files, in bytes."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.file_shapes.values())

    def summary_lines(self) -> list[str]:
        """Return the lines of training, without its learning rate, BatchNorm and checkpoints, plus the probe's candidate values."""
        probe, counts = self.probe, ", ".join(f"{count:,} {name}" for name, count in self.image_counts.items())
        features = "its pooled feature" if self.backbone else f"blocks {', '.join(map(str, self.layers))}"
        candidates = [
            f"{kind} by {name} of {', '.join(f'{value:g}' for value in values(probe))}"
            for kind, (name, values) in HYPERPARAMETERS.items()
            if kind in probe.kinds
        ]
        return [
            *(line for line in super().summary_lines() if not line.startswith(("lr ", "norm ", "save "))),
            f"probe     {'; '.join(candidates)}",
            f"features  {features} of {counts} images: {format_bytes(self.feature_files_bytes)}, computed once",
        ]


def plan_probe_or_training(cfg: FinetuneConfig, world_size: int) -> FinetunePlan:
    """Return the plan of a probe, or of a training without ``probe``. Raises: ConfigError, DataError, ExportError."""
    if cfg.probe is None:
        return plan_training(cfg, world_size)
    _check_probe_settings(cfg, cfg.probe)
    training_plan = plan_training(cfg, world_size)
    plan = ProbePlan(**{field.name: getattr(training_plan, field.name) for field in fields(training_plan)})
    _check_features(plan)
    _check_holdout(plan)
    return plan


# Settings that only the training of an encoder uses.
_TRAINING_ONLY_SETTINGS = (
    *(
        "drop_path",
        "dropout",
        "label_smoothing",
        "mixup",
        "cutmix",
        "random_erasing",
        "class_weights",
        "ema_decay",
        "freeze_encoder",
    ),
    *("adversarial", "teacher", "early_stopping", "evaluate_every", "optim.lr_per_256", "optim.layer_decay"),
    *("optim.name", "optim.momentum", "optim.schedule", "optim.step_epochs"),
)


def _check_probe_settings(cfg: FinetuneConfig, probe: ProbeConfig) -> None:
    """Raise ConfigError if settings exclude a probe."""
    default = FinetuneConfig.model_construct(optim=type(cfg.optim)())
    for name in _TRAINING_ONLY_SETTINGS:
        value = functools.reduce(getattr, name.split("."), cfg)
        default_value = functools.reduce(getattr, name.split("."), default)
        if value != default_value:
            hint = "; the heads' rates are probe.linear_lr_per_256 and probe.attentive_lr_per_256" * ("lr_" in name)
            setting = f"{name}={value:g}" if isinstance(value, int | float) else name
            raise ConfigError(
                f"{setting} is for training the encoder, which a probe leaves as it is: leave it out, or as "
                f"{default_value}{hint}"
            )
    if "knn" in probe.kinds and (probe.metric, probe.vote) == ("euclidean", "softmax"):
        raise ConfigError(
            "probe.vote=softmax weighs cosine similarities: set probe.metric=cosine or probe.vote=uniform"
        )


def _check_features(plan: ProbePlan) -> None:
    """Raise ConfigError if the encoder lacks the features, their size exceeds the limit, or images are too few."""
    cfg, probe, card = plan.cfg, plan.probe, plan.backbone
    if card is not None:
        settings = {"probe.layers": probe.layers, "probe.features": probe.features}
        unsupported = [f"{name}={value}" for name, value in settings.items() if value is not None]
        if probe.reads_patches:
            unsupported.append("probe.kinds with attentive")
        if unsupported:
            raise ConfigError(
                f"{unsupported[0]}: of a model of timm ({card.timm}) only the pooled feature is read; leave it out"
            )
    elif plan.layers[-1] > plan.encoder["depth"]:
        raise ConfigError(
            f"probe.layers has {plan.layers[-1]}, and the encoder has blocks 1 to {plan.encoder['depth']}"
        )
    if plan.feature_files_bytes > probe.max_gigabytes * 1e9:
        largest = "patches" if probe.reads_patches else "features"
        raise ConfigError(
            f"probe.max_gigabytes={probe.max_gigabytes:g}, but the {largest} of {sum(plan.image_counts.values()):,} images in "
            f"{len(plan.layers)} layers take {format_bytes(plan.feature_files_bytes)}: allow as much, or set data.samples_per_class, "
            f"fewer layers or other kinds"
        )
    if "knn" in probe.kinds and max(probe.k) > plan.image_counts["train"]:
        raise ConfigError(
            f"probe.k has {max(probe.k)}, and there are {plan.image_counts['train']} images to be neighbours"
        )
    if cfg.batch.global_size > plan.image_counts["train"]:
        raise ConfigError(
            f"batch.global_size={cfg.batch.global_size}, and there are {plan.image_counts['train']} images to learn from"
        )


def _check_holdout(plan: ProbePlan) -> None:
    """Raise ConfigError if there are candidates to select from but no holdout to select by."""
    if plan.cfg.data.holdout_per_class:
        return
    choices = [
        f"probe.{kind}: {len(values(plan.probe))} values of {name}"
        for kind, (name, values) in HYPERPARAMETERS.items()
        if kind in plan.probe.kinds and len(values(plan.probe)) > 1
    ]
    if len(plan.layers) > 1:
        choices.append(f"probe.layers: {len(plan.layers)} layers")
    if choices:
        raise ConfigError(
            f"{choices[0]} to choose from, but data.holdout_per_class=0 leaves nothing to choose by; set it"
        )
