"""Checks of fine-tuning's settings: combinations that exclude each other, and settings that a task does not support."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune.config import FinetuneConfig
from finetune.task import TASK_SETTINGS, Task
from foveal.data.sampling.subset import eval_split
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    build_backbone,
    build_meta_backbone,
    get_layer_ids,
    has_distillation_token,
    set_activation_checkpointing,
)
from foveal.models.vit import EncoderCard
from foveal.training.evaluations import Metric
from foveal.weights.export import Card


def check_settings(cfg: FinetuneConfig, task: Task) -> None:
    """Raise ConfigError if the task does not support a setting, or settings exclude each other."""
    for name, purpose in TASK_SETTINGS.items():
        if name not in task.supported_settings and _is_set(cfg, name):
            raise ConfigError(f"{name} {purpose}, and task={task.name} does not support it: leave it out")
    if cfg.class_weights == "balanced" and not task.has_index_labels:
        raise ConfigError(
            f"class_weights=balanced counts classes in the index, which has none of task={task.name}; give a list of "
            "weights"
        )
    task.check_settings(cfg)


def check_other_sections(cfg: FinetuneConfig, tasks: Sequence[Task]) -> None:
    """Raise ConfigError if the section of another task than the config's is set."""
    for task in tasks:
        section = task.settings_section
        if section is not None and task.name != cfg.task and _is_set(cfg, section):
            raise ConfigError(f"{section} is for task={task.name}, and task={cfg.task}; leave it out")


def find_selection_metric(cfg: FinetuneConfig, task: Task) -> Metric | None:
    """Return the metric of early stopping by its logged name; None without early stopping.

    Raises: ConfigError if early stopping or the plateau schedule follows a metric that evaluations do not log.
    """
    prefixes = (eval_split(cfg.data).metric_prefix, *(("holdout",) if cfg.data.holdout_per_class else ()))
    metrics = [metric.with_prefix(prefix) for prefix in prefixes for metric in task.metrics(cfg)]
    names = ", ".join(metric.name for metric in metrics)
    early_stopping = cfg.early_stopping
    if early_stopping is None:
        if cfg.optim.schedule == "plateau":
            raise ConfigError(
                f"optim.schedule=plateau follows early_stopping.metric, and there is no early_stopping: set it to one "
                f"of {names} (early_stopping.patience=null trains to the end)"
            )
        return None
    metric = next((metric for metric in metrics if metric.name == early_stopping.metric), None)
    if metric is None:
        can_hold_out = task.has_index_labels and not cfg.data.holdout_per_class
        hint = "; data.holdout_per_class adds the metrics of the holdout" if can_hold_out else ""
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is not among what every evaluation logs: {names}{hint}"
        )
    if not cfg.evaluate_every:
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is logged only at the end, because evaluate_every=0: set "
            f"evaluate_every to the steps between evaluations, each of which logs {names}"
        )
    return metric


def check_stopping_uses_holdout(cfg: FinetuneConfig, nested_run_phrase: str) -> None:
    """Raise ConfigError if a nested run (``nested_run_phrase``, such as "a fold") would stop by the data that evaluates it."""
    if cfg.early_stopping_metric is not None and not cfg.early_stopping_metric.startswith("holdout_"):
        raise ConfigError(
            f"early_stopping.metric={cfg.early_stopping_metric} would stop {nested_run_phrase} by the data that it is evaluated on: "
            f"take a holdout_ metric, with data.holdout_per_class"
        )


def check_mixup_pairing(cfg: FinetuneConfig, microbatch_size: int) -> None:
    """Raise ConfigError if mixup or cutmix cannot pair the images of a microbatch."""
    if (cfg.mixup or cfg.cutmix) and microbatch_size % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a microbatch, which has {microbatch_size} here: take an even number "
            f"of images per rank (batch.global_size, batch.max_micro_size)"
        )


def check_split_batch_norm(cfg: FinetuneConfig, model_name: str, *, has_batch_norm: bool) -> None:
    """Raise ConfigError if adversarial.separate_batchnorm is set for a model without BatchNorm."""
    if cfg.adversarial is not None and cfg.adversarial.separate_batchnorm and not has_batch_norm:
        raise ConfigError(
            f"adversarial.separate_batchnorm is for BatchNorm, which {model_name} does not have; leave it out"
        )


def check_distillation_token(cfg: FinetuneConfig, card: EncoderCard | BackboneCard) -> None:
    """Raise ConfigError if teacher.kind=token and the encoder has no token to distill into."""
    if cfg.teacher is None or cfg.teacher.kind != "token":
        return
    if isinstance(card, BackboneCard):
        if not has_distillation_token(build_meta_backbone(*card.build_args, card.classes)):
            raise ConfigError(
                f"teacher.kind=token trains a distillation token, which {card.timm} does not have; take a backbone "
                f"such as deit_tiny_distilled_patch16_224, or kind=hard"
            )
    elif not card.registers:
        raise ConfigError(
            "teacher.kind=token trains the first register as distillation token, and the encoder has none; give it "
            "model.registers=1, or take kind=hard"
        )
    elif card.pooling != "token":
        raise ConfigError(
            f"teacher.kind=token reads normalized tokens, and with pooling={card.pooling} there is no norm before the "
            f"pooling; set pooling=token"
        )


def check_export_fits(cfg: FinetuneConfig, task: Task, export_card: Card | None) -> None:
    """Raise ExportError if the task reads tokens that the export does not normalize."""
    lacks_token_norm = (
        export_card is not None and export_card.encoder.get("pooling") == "avg" and task.resolve_pooling(cfg) == "token"
    )
    if lacks_token_norm and cfg.probe is None:  # a probe reads the encoder with the export's own pooling and norm
        raise ExportError(
            f"the export {cfg.init} was fine-tuned with pooling=avg and has no norm behind its tokens; give a "
            f"pretrained encoder, or one fine-tuned with pooling=token"
        )


def check_trials_evaluation(cfg: FinetuneConfig, task: Task) -> None:
    """Raise ConfigError if trials have no top-1 to compare, or would stop by the data that evaluates them."""
    check_stopping_uses_holdout(cfg, "a trial")
    if "top1" not in {metric.name for metric in task.metrics(cfg)}:
        raise ConfigError(
            f"trials compares top-1, which task={task.name} has not: start a run for each initialization and learning "
            f"rate instead"
        )


def check_backbone_pooling(card: BackboneCard, cfg: FinetuneConfig) -> None:
    """Raise ConfigError if a pooling is set, which the timm model has itself."""
    if _is_set(cfg, "pooling"):
        raise ConfigError(f"pooling={cfg.pooling} is of foveal's encoders, {card.timm} has its own; leave it out")


def check_backbone_supports_settings(card: BackboneCard, cfg: FinetuneConfig) -> None:
    """Raise ConfigError if the timm model does not support the settings."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone: Any = build_backbone(*card.build_args, num_classes=card.classes, drop_path=cfg.drop_path)
    if cfg.dropout and not isinstance(backbone.get_classifier(), nn.Linear):
        raise ConfigError(
            f"dropout={cfg.dropout:g} is before one linear head, which {card.timm} does not have; leave it out"
        )
    if cfg.optim.layer_decay < 1:
        get_layer_ids(backbone)
    if cfg.engine.activation_checkpointing:
        set_activation_checkpointing(backbone, enable=True)


def _is_set(cfg: FinetuneConfig, dotted_name: str) -> bool:
    """Return whether a setting differs from its default."""
    *sections, name = dotted_name.split(".")
    section = functools.reduce(getattr, sections, cfg)
    return getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True)
