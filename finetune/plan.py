"""What the settings of fine-tuning come to: the encoder, the classes, and all that can be refused before a run begins."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.checks import (
    check_backbone_forward,
    check_detector_forward,
    check_distillation_token,
    check_even_microbatch,
    check_settings,
    check_split_batchnorm,
    check_task_settings,
    check_trials,
    resolve_pooling,
)
from finetune.config import FinetuneConfig
from finetune.early_stopping import check_early_stopping, early_stopping_science
from foveal.config import check_folder_name, set_by_dotted_key
from foveal.data import Dataset
from foveal.data.image.targets import make_label_reader
from foveal.data.sampling.subset import eval_split
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    build_backbone,
    build_meta_backbone,
    check_resizable,
    format_image_size,
    get_layer_ids,
    has_batch_norm,
    parse_encoder_card,
    set_activation_checkpointing,
)
from foveal.models.sliding_window import window_corners
from foveal.models.vit import EncoderCard, encoder_card
from foveal.timeouts import read_with_timeout
from foveal.training.plan import Plan, add_inherited_prefix, build_stage_plan
from foveal.weights.export import Card
from foveal.weights.pretrained import PretrainedSource, inspect_pretrained


@dataclass(frozen=True)
class FinetunePlan(Plan):
    """A plan with the encoder it will build and the names of its classes."""

    cfg: FinetuneConfig
    encoder: dict[str, Any] = None  # type: ignore[assignment]
    classes: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()
    init_source: PretrainedSource | None = None
    teacher: PretrainedSource | None = None

    @property
    def num_runs(self) -> int:
        trials, folds = self.cfg.trials, self.cfg.folds
        if folds is not None:
            return folds.count * folds.repeats
        return 1 if trials is None else len(trials.arms) * len(trials.lr_per_256) * trials.repeats

    @property
    def backbone(self) -> BackboneCard | None:
        """What it builds, if that is no encoder of foveal's."""
        card = parse_encoder_card(self.encoder, "model")
        return card if isinstance(card, BackboneCard) else None

    def summary_lines(self) -> list[str]:
        folds = self.cfg.folds
        many = (
            []
            if folds is None
            else [f"folds     {folds.count} folds x {folds.repeats} repeats = {self.num_runs} runs like this"]
        )
        return [*super().summary_lines(), *self._norm_lines(), *self._evaluation_lines(), *many]

    def _norm_lines(self) -> list[str]:
        """That the curve depends on more than is stated."""
        card = self.backbone
        if card is None or not _has_batchnorm(card) or self.cfg.frozen:
            return []
        line = "norm      BatchNorm sees the images that a rank holds at once: the curve depends on the number of ranks and"
        return [f"{line} on batch.at_once ({self.microbatch_size} images here)"]

    def _evaluation_lines(self) -> list[str]:
        """What of an image is measured, and through what."""
        data = self.cfg.data
        if data.labels not in ("mask", "boxes"):
            return []
        windows = data.labels == "mask"
        number = len(window_corners(data.eval_image_hw, data.image_hw, self.cfg.segment.stride)) if windows else 1
        part = "whole images" if data.crop_ratio == 1 else f"the middle of images (data.crop_ratio={data.crop_ratio:g})"
        seen = f"measured  on {part}, as {format_image_size(data.eval_image_hw)} pixels"
        return [f"{seen}, in {number} windows of {format_image_size(data.image_hw)}" if number > 1 else seen]


def _has_batchnorm(card: BackboneCard) -> bool:
    """Whether BatchNorm makes a sample depend on others."""
    return has_batch_norm(build_meta_backbone(*card.build_args, card.classes))


def plan_training(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    """Everything that can be refused before a run begins; with trials, for every arm.

    Raises: ConfigError, DataError, ExportError.
    """
    if cfg.trials is None:
        return _plan_run(cfg, ranks)
    check_trials(cfg)
    if cfg.run.stop_at is not None:
        raise ConfigError("run.stop_at and trials exclude each other: a comparison is of whole runs; shorten epochs")
    if cfg.init is not None:
        raise ConfigError("init and trials exclude each other: trials.arms says what each arm starts from")
    rate, *others = cfg.trials.lr_per_256
    if others and not cfg.data.holdout_per_class:
        raise ConfigError(
            "trials.lr_per_256 has several rates, but data.holdout_per_class=0 leaves nothing to choose by; set it"
        )
    for arm in cfg.trials.arms:
        check_folder_name("trials.arms", arm)
    if len({*cfg.trials.lr_per_256}) < len(cfg.trials.lr_per_256):
        raise ConfigError(
            f"trials.lr_per_256={list(cfg.trials.lr_per_256)} has a rate twice: both would be one run; give each once"
        )
    arms = {arm: _plan_run(trial_config(cfg, arm, 0, rate), ranks) for arm in cfg.trials.arms}
    first = next(iter(arms.values()))
    origin = {f"arm.{name}": arm.inherited_science.get("inherited.init", "scratch") for name, arm in arms.items()}
    origin |= _evaluation_science(first.dataset, cfg, first.classes)
    shared = {"encoder": first.encoder, "classes": first.classes, "class_weights": first.class_weights}
    return build_stage_plan(FinetunePlan, cfg, ranks, extra_science=origin, **shared)


def trial_config(cfg: FinetuneConfig, arm: str, repeat: int, lr_per_256: float) -> FinetuneConfig:
    """The settings of one trial, an ordinary run inside the run directory of the comparison."""
    assert cfg.trials is not None
    init = cfg.trials.arms[arm]
    changes = {"init": init, "seed": cfg.seed + repeat, "optim.lr_per_256": lr_per_256}
    changes |= dict.fromkeys(("model", "backbone") if init else ("init_name",))
    return nested_run_config(cfg, f"trials/{arm}-seed{cfg.seed + repeat}-lr{lr_per_256:g}", changes)


def nested_run_config(cfg: FinetuneConfig, subdirectory: str, overrides: dict[str, Any]) -> FinetuneConfig:
    """The settings of an ordinary run at a place inside the run directory of one that is made of many.

    ``changes`` are dotted settings. MLflow hears of the outer run alone.
    """
    tree = cfg.model_dump() | {"trials": None, "folds": None}
    ours = {"run.dir": f"{cfg.run.dir}/{subdirectory}", "run.fresh": False, "tracking.uri": None}
    for name, value in (overrides | ours).items():
        set_by_dotted_key(tree, name, value)
    return FinetuneConfig.from_dict(tree, subdirectory)


def _plan_run(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    check_settings(cfg)
    check_early_stopping(cfg.early_stopping, cfg.evaluate_every, cfg, adversarial=cfg.adversarial is not None)
    start = _inspect_init_source(cfg)
    card = None if start is None else start.card
    check_task_settings(cfg, card)
    encoder, resized_from = _resolve_encoder_card(cfg, card)
    plan = build_stage_plan(FinetunePlan, cfg, ranks, source_card=card, encoder=encoder, resized_from=resized_from)
    classes = _resolve_classes(plan.dataset, cfg)
    for other in plan.training_set.sources[1:]:
        if other.dataset.classes not in {None, classes}:
            raise DataError(
                f"{other.dataset.folder} (data.mix) has other classes than {plan.dataset.folder}: index it with the same "
                f"names in the same order, or without labels"
            )
        make_label_reader(cfg.data, other.dataset)
    check_even_microbatch(cfg, plan.microbatch_size)
    origin = _evaluation_science(plan.dataset, cfg, classes) | ({} if card is None else {"init": card.sha256})
    teacher = _inspect_teacher(cfg, classes, plan.mean, plan.std)
    origin |= {} if teacher is None else {"teacher": teacher.card.sha256}
    inherited = plan.inherited_science | add_inherited_prefix(origin)
    outputs = len(classes) if cfg.data.labels in ("class", "classes") else 0  # of the encoder's own head
    weights = _resolve_class_weights(cfg, plan, classes)
    encoder |= {"classes": outputs}
    found = {"classes": classes, "class_weights": weights, "init_source": start, "teacher": teacher}
    plan = replace(plan, inherited_science=inherited, encoder=encoder, **found)
    check_distillation_token(cfg, parse_encoder_card(encoder, "model"))
    told = plan.backbone
    check_split_batchnorm(
        cfg, encoder.get("timm") or encoder["name"], has_batchnorm=told is not None and _has_batchnorm(told)
    )
    if told is not None:
        _check_backbone(told, cfg, plan.microbatch_size, len(classes))
    if cfg.data.labels == "boxes":
        check_detector_forward(cfg, parse_encoder_card(plan.encoder, "model"), plan.microbatch_size, len(classes))
    return plan


def _inspect_init_source(cfg: FinetuneConfig) -> PretrainedSource | None:
    """The weights to start from: an export, or what others left for a model of timm. Raises: ConfigError, ExportError."""
    if cfg.init is None:
        if cfg.init_name is not None:
            raise ConfigError(
                f"init_name={cfg.init_name} says what init is, and init is null; set init, or leave it out"
            )
        return None
    place = Path(cfg.init)
    ours = read_with_timeout(place, cfg.data.patience_seconds, (place / "card.json").exists)
    return inspect_pretrained(place, None if ours else cfg.init_name, cfg.data)


def _evaluation_science(dataset: Dataset, cfg: FinetuneConfig, classes: tuple[str, ...]) -> dict[str, str]:
    """What a result is measured on is science too."""
    judging = early_stopping_science(cfg.early_stopping, cfg.evaluate_every)
    return {"val": dataset.digest(eval_split(cfg.data).split), "classes": ", ".join(classes)} | judging


def _resolve_encoder_card(
    cfg: FinetuneConfig, card: Card | None
) -> tuple[dict[str, Any], int | tuple[int, int] | None]:
    """The card of the classifier's encoder, the export's or that of the model from scratch, and what it is resized from."""
    data = cfg.data
    if cfg.model is not None and cfg.backbone is not None:
        raise ConfigError("model and backbone exclude each other: an encoder of foveal's, or a model of timm as it is")
    if card is None:
        if cfg.backbone is not None:
            return backbone_card(cfg.backbone, data.image_size, data.channels), None
        if cfg.model is None:
            raise ConfigError("model is missing: without init, the encoder from scratch must be stated")
        return encoder_card(cfg.model, data.image_size, data.channels, pooling=resolve_pooling(cfg)), None
    hers = parse_encoder_card(card.encoder, f"{cfg.init}/card.json")
    _check_matches_export(cfg, hers)
    size = {"image_size": data.to_dict()["image_size"]}
    if isinstance(hers, BackboneCard):
        check_resizable(hers, data.image_size, f"the export {cfg.init}")
        return card.encoder | size, None if hers.image_size == data.image_size else hers.image_size
    return card.encoder | {"pooling": resolve_pooling(cfg)} | size, hers.trained_size_if_different(data.image_size)


def _check_matches_export(cfg: FinetuneConfig, export_card: EncoderCard | BackboneCard) -> None:
    """What the config says beside an export must be what the export is. Raises: ExportError."""
    stated: dict[str, Any] = {"channels": cfg.data.channels}
    name, other = ("timm", "model") if isinstance(export_card, BackboneCard) else ("name", "backbone")
    if getattr(cfg, other) is not None:
        raise ExportError(
            f"the export {cfg.init} is a {getattr(export_card, name)}, which {other} does not say; leave it out"
        )
    if cfg.backbone is not None:
        stated["timm"] = cfg.backbone
    if cfg.model is not None:
        stated |= {name: value for name, value in cfg.model.resolve().to_dict().items() if name != "name"}
    for name, value in stated.items():
        if getattr(export_card, name) != value:
            raise ExportError(
                f"the export {cfg.init} has {name} {getattr(export_card, name)}, the config says {value}; they must be equal"
            )


def _check_backbone(card: BackboneCard, cfg: FinetuneConfig, at_once: int, classes: int) -> None:
    """What a model of timm must have of what the settings ask for. Raises: ConfigError."""
    default = FinetuneConfig.model_fields["pooling"].default
    if cfg.pooling != default:
        raise ConfigError(f"pooling={cfg.pooling} is of foveal's encoders, {card.timm} has its own; leave it out")
    check_backbone_forward(
        card, cfg, max(2, at_once) if cfg.frozen else at_once, classes
    )  # what is frozen learns from no batch
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(*card.build_args, num_classes=card.classes, drop_path=cfg.drop_path)
    head: Any = backbone
    if cfg.dropout and not isinstance(head.get_classifier(), nn.Linear):
        raise ConfigError(
            f"dropout={cfg.dropout:g} is before one linear head, which {card.timm} does not have; leave it out"
        )
    if cfg.optim.layer_decay < 1:
        get_layer_ids(backbone)
    if cfg.engine.recompute:
        set_activation_checkpointing(backbone, enable=True)


def _resolve_class_weights(cfg: FinetuneConfig, plan: FinetunePlan, classes: tuple[str, ...]) -> tuple[float, ...]:
    """The weight of each class in the loss. Raises: ConfigError, DataError."""
    told = cfg.class_weights
    if told is None:
        return (1.0,) * len(classes)
    if told != "balanced":
        if len(told) != len(classes):
            raise ConfigError(
                f"class_weights has {len(told)} weights for {len(classes)} classes; give one for each, by label"
            )
        if not all(weight > 0 for weight in told):
            raise ConfigError(f"class_weights={list(told)}: a weight is above 0, or a batch may weigh nothing")
        return told
    if cfg.data.mix:
        raise ConfigError(
            "class_weights=balanced counts the classes of data.path alone; with data.mix give a list of weights"
        )
    source = plan.training_set.sources[0]
    labels = source.dataset.labels(source.split)
    labels = labels if source.subset.chosen_ids is None else labels[source.subset.chosen_ids]
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if not counts.all():
        empty = classes[int(counts.argmin())]
        raise DataError(
            f"{source.dataset.folder}: class '{empty}' has no sample to train on, which class_weights=balanced needs"
        )
    return tuple((counts.sum() / (len(classes) * counts)).tolist())


def _resolve_classes(dataset: Dataset, cfg: FinetuneConfig) -> tuple[str, ...]:
    told = make_label_reader(cfg.data, dataset)
    if dataset.classes is None:
        raise DataError(f"{dataset.folder}: its samples have no classes to learn; index shards that hold .cls members")
    for split in () if told else (cfg.data.train, eval_split(cfg.data).split):
        highest = int(dataset.labels(split).max())
        if highest < 0:
            raise DataError(f"{dataset.folder}: no sample of split '{split}' has a label")
        if highest >= len(dataset.classes):
            raise DataError(
                f"{dataset.folder}: split '{split}' has label {highest}, but there are {len(dataset.classes)} classes"
            )
    return dataset.classes


def _inspect_teacher(
    cfg: FinetuneConfig, classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> PretrainedSource | None:
    """The settings' teacher, which must have the same classes and see the same pixels. Raises: ExportError."""
    if cfg.teacher is None:
        return None
    origin = inspect_pretrained(Path(cfg.teacher.init), None, cfg.data)
    if not origin.card.encoder.get("classes"):
        raise ExportError(
            f"the teacher {cfg.teacher.init} has no head that tells classes of an image; give the export of a classifier"
        )
    channels = parse_encoder_card(origin.card.encoder, f"{cfg.teacher.init}/card.json").channels
    for name, hers, ours in (
        ("classes", origin.card.classes, classes),
        ("channels", channels, cfg.data.channels),
        ("mean", origin.card.mean, mean),
        ("std", origin.card.std, std),
    ):
        if hers != ours:
            raise ExportError(
                f"the teacher {cfg.teacher.init} has {name} {_short(hers)}, the student {_short(ours)}; they must be equal"
            )
    return origin


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
