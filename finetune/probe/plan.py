"""What a probe comes to, and everything about it that can be refused before it begins."""

import functools
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from finetune.config import FinetuneConfig
from finetune.plan import FinetunePlan
from finetune.plan import plan_training as plan_of_training
from finetune.probe.config import HYPERPARAMETERS, ProbeConfig, ProbeKind
from foveal.atomic import format_bytes
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.errors import ConfigError
from foveal.models.backbone import infer_pooled_width
from foveal.models.vit import ResolvedVitConfig

FileShapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # of files, by name


@dataclass(frozen=True)
class ProbePlan(FinetunePlan):
    """A plan whose encoder stays as it is."""

    @property
    def probe(self) -> ProbeConfig:
        """The section that makes it one."""
        assert self.cfg.probe is not None
        return self.cfg.probe

    @property
    def kind_layer_pairs(self) -> list[tuple[ProbeKind, int]]:
        """Kinds by layers: what is learned and told one by one."""
        return [(kind, layer) for kind in dict.fromkeys(self.probe.kinds) for layer in self.layers]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that are read, from 1; of a model of timm its one feature, called 0."""
        return (0,) if self.backbone else self.probe.resolve_layers(self.encoder["depth"])

    @property
    def subsets(self) -> dict[str, tuple[str, SubsetName]]:
        """The parts whose features are needed: name to split and part."""
        data = self.cfg.data
        held: dict[str, tuple[str, SubsetName]] = {"holdout": (data.train, "holdout")} if data.holdout_per_class else {}
        return {"train": (data.train, "train"), **held, "val": (data.val, "all")}

    @cached_property
    def image_counts(self) -> dict[str, int]:
        """Images of each part."""
        data = self.cfg.data
        return {
            name: len(select_subset(self.dataset, data, split=split, subset=subset, seed=self.cfg.seed))
            for name, (split, subset) in self.subsets.items()
        }

    @property
    def file_shapes(self) -> FileShapes:
        """Shape and type of each file of features by its name."""
        layers, (width, patches) = len(self.layers), self._token_sizes
        found: FileShapes = {}
        for name, images in self.image_counts.items():
            found[f"{name}-labels.npy"] = (images,), np.int64
            if self.probe.reads_pooled:
                found[f"{name}-pooled.npy"] = (layers, images, self.feature_dim), np.float32
            if self.probe.reads_patches:
                found[f"{name}-patches.npy"] = (layers, images, patches, width), np.float16
        return found

    @property
    def feature_dim(self) -> int:
        """Numbers of a feature of the whole image."""
        return self._token_sizes[0] * (2 if self.probe.features == "both" else 1)

    @property
    def _token_sizes(self) -> tuple[int, int]:
        """Width of a token and number of patches."""
        if self.backbone:
            return infer_pooled_width(*self.backbone.build_args), 0
        sizes = ResolvedVitConfig.model_validate({name: self.encoder[name] for name in ResolvedVitConfig.model_fields})
        rows, columns = sizes.patch_grid(self.cfg.data.image_size)
        return sizes.width, rows * columns

    @property
    def total_bytes(self) -> int:
        """What all features take."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.file_shapes.values())

    def summary_lines(self) -> list[str]:
        """The plan in words: that of training, but for the learning rate, which each kind has for itself."""
        probe, counts = self.probe, ", ".join(f"{count:,} {name}" for name, count in self.image_counts.items())
        read = "its pooled feature" if self.backbone else f"blocks {', '.join(map(str, self.layers))}"
        chosen = [
            f"{kind} by {name} of {', '.join(f'{value:g}' for value in values(probe))}"
            for kind, (name, values) in HYPERPARAMETERS.items()
            if kind in probe.kinds
        ]
        return [
            *(line for line in super().summary_lines() if not line.startswith(("lr ", "norm "))),
            f"probe     {'; '.join(chosen)}",
            f"features  {read} of {counts} images: {format_bytes(self.total_bytes)}, computed once",
        ]


def plan_probe(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    """The plan of a probe, or of training. Raises: ConfigError, DataError, ExportError."""
    if cfg.probe is None:
        return plan_of_training(cfg, ranks)
    _check_probe_settings(cfg, cfg.probe)
    found = plan_of_training(cfg, ranks)
    probed = ProbePlan(**{each.name: getattr(found, each.name) for each in fields(found)})
    _check_features(probed)
    _check_holdout(probed)
    return probed


# What only a training of the encoder has a use for.
_TRAINING_ONLY_SETTINGS = (
    *("drop_path", "dropout", "label_smoothing", "mixup", "cutmix", "erase", "class_weights", "average", "frozen"),
    *("adversarial", "teacher", "early_stopping", "evaluate_every", "optim.lr_per_256", "optim.layer_decay"),
    *("optim.kind", "optim.momentum", "optim.schedule", "optim.step_epochs"),
)


def _check_probe_settings(cfg: FinetuneConfig, probe: ProbeConfig) -> None:
    for name in ("trials", "folds"):
        if getattr(cfg, name) is not None:
            raise ConfigError(f"probe and {name} exclude each other: a probe trains no encoder; take one of them out")
    if cfg.data.fold is not None or cfg.data.labels != "class":
        raise ConfigError(
            "probe reads one class of an image, and is judged on data.val: leave out data.labels and data.fold"
        )
    if cfg.run.stop_at is not None:
        raise ConfigError("run.stop_at and probe exclude each other: its heads are trained to the end; shorten epochs")
    if cfg.data.mix:
        raise ConfigError("data.mix and probe exclude each other: features are those of data.path alone; leave mix out")
    default = FinetuneConfig.model_construct(optim=type(cfg.optim)())
    for name in _TRAINING_ONLY_SETTINGS:
        value, usual = (functools.reduce(getattr, name.split("."), each) for each in (cfg, default))
        if value != usual:
            rates = "; the heads' rates are probe.linear_lr_per_256 and probe.attentive_lr_per_256" * ("lr_" in name)
            given = f"{name}={value:g}" if isinstance(value, int | float) else name
            raise ConfigError(
                f"{given} is for training the encoder, which a probe leaves as it is: leave it out, or as {usual}{rates}"
            )
    if "knn" in probe.kinds and (probe.metric, probe.vote) == ("euclidean", "softmax"):
        raise ConfigError(
            "probe.vote=softmax weighs cosine similarities: set probe.metric=cosine or probe.vote=uniform"
        )


def _check_features(plan: ProbePlan) -> None:
    """What is read must be there, and fit the disk that is allowed. Raises: ConfigError."""
    cfg, probe, card = plan.cfg, plan.probe, plan.backbone
    if card is not None:
        given = {"probe.layers": probe.layers, "probe.features": probe.features}
        asked = [f"{name}={value}" for name, value in given.items() if value is not None]
        asked += ["probe.kinds with attentive"] if probe.reads_patches else []
        if asked:
            raise ConfigError(
                f"{asked[0]}: of a model of timm ({card.timm}) only the pooled feature is read; leave it out"
            )
    elif plan.layers[-1] > plan.encoder["depth"]:
        raise ConfigError(
            f"probe.layers has {plan.layers[-1]}, and the encoder has blocks 1 to {plan.encoder['depth']}"
        )
    if plan.total_bytes > probe.gigabytes * 1e9:
        largest = "patches" if probe.reads_patches else "features"
        raise ConfigError(
            f"probe.gigabytes={probe.gigabytes:g}, but the {largest} of {sum(plan.image_counts.values()):,} images in "
            f"{len(plan.layers)} layers take {format_bytes(plan.total_bytes)}: allow as much, or set data.per_class, fewer "
            f"layers or other kinds"
        )
    if "knn" in probe.kinds and max(probe.k) > plan.image_counts["train"]:
        raise ConfigError(
            f"probe.k has {max(probe.k)}, and there are {plan.image_counts['train']} images to be neighbours"
        )
    if cfg.batch.images > plan.image_counts["train"]:
        raise ConfigError(
            f"batch.images={cfg.batch.images}, and there are {plan.image_counts['train']} images to learn from"
        )


def _check_holdout(plan: ProbePlan) -> None:
    """Where there is something to choose, it must be chosen by other images than those of data.val. Raises: ConfigError."""
    if plan.cfg.data.holdout_per_class:
        return
    several = [
        f"probe.{kind}: {len(values(plan.probe))} values of {name}"
        for kind, (name, values) in HYPERPARAMETERS.items()
        if kind in plan.probe.kinds and len(values(plan.probe)) > 1
    ]
    several += [f"probe.layers: {len(plan.layers)} layers"] if len(plan.layers) > 1 else []
    if several:
        raise ConfigError(
            f"{several[0]} to choose from, but data.holdout_per_class=0 leaves nothing to choose by; set it"
        )
