"""Planning of a fine-tuning run: encoder card, classes and class weights, and every check before the run starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.checks import (
    check_backbone_pooling,
    check_backbone_supports_settings,
    check_distillation_token,
    check_export_fits,
    check_mixup_pairing,
    check_other_sections,
    check_settings,
    check_split_batch_norm,
    check_trials_evaluation,
    find_selection_metric,
)
from finetune.config import FinetuneConfig
from finetune.label_checks import check_labels
from finetune.task import FinetunePlan, Task
from finetune.tasks.registry import TASKS, find_task
from foveal.config import check_folder_name, set_by_dotted_key
from foveal.data.dataset import Dataset
from foveal.data.sampling.sources import find_image_member
from foveal.data.sampling.subset import eval_split
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    parse_encoder_card,
)
from foveal.models.resizable import check_resizable
from foveal.models.vit import EncoderCard, encoder_card, resolve_sizes
from foveal.timeouts import read_with_timeout
from foveal.training.plan import add_inherited_prefix, build_stage_plan, check_evaluation_data
from foveal.training.run_directory import is_run_begun
from foveal.weights.export import Card
from foveal.weights.pretrained import PretrainedSource, inspect_pretrained


def plan_training(cfg: FinetuneConfig, world_size: int) -> FinetunePlan:
    """Return the plan of a training or, with ``trials``, of a comparison whose arms are all checked.

    Raises: ConfigError, DataError, ExportError.
    """
    if cfg.trials is None:
        return _plan_run(cfg, world_size)
    check_trials_evaluation(cfg, find_task(cfg.task))
    for arm in cfg.trials.arms:
        check_folder_name("trials.arms", arm)
    if len(set(cfg.trials.lr_per_256)) < len(cfg.trials.lr_per_256):
        raise ConfigError(
            f"trials.lr_per_256={list(cfg.trials.lr_per_256)} has a rate twice: both would be one run; give each once"
        )
    lr = next(iter(cfg.trials.lr_per_256))
    arms = {arm: _plan_run(trial_config(cfg, arm, 0, lr), world_size) for arm in cfg.trials.arms}
    first = next(iter(arms.values()))
    digests = {f"arm.{name}": arm.inherited_science.get("inherited.init", "scratch") for name, arm in arms.items()}
    return build_stage_plan(
        FinetunePlan,
        cfg,
        world_size,
        extra_science=digests | _evaluation_science(first.dataset, cfg, first.classes),
        arms={f"arm.{name}": arm.init_source for name, arm in arms.items() if arm.init_source is not None},
        task=first.task,
        label_reader=first.label_reader,
        encoder=first.encoder,
        classes=first.classes,
        class_weights=first.class_weights,
        label_lines=first.label_lines,
    )


def trial_config(cfg: FinetuneConfig, arm: str, repeat: int, lr_per_256: float) -> FinetuneConfig:
    """Return the settings of one trial, a nested run in the run directory of the comparison."""
    assert cfg.trials is not None
    init = cfg.trials.arms[arm]
    changes = {"init": init, "seed": cfg.seed + repeat, "optim.lr_per_256": lr_per_256}
    changes |= dict.fromkeys(("model", "backbone") if init else ("init_name",))
    return nested_run_config(cfg, f"trials/{arm}-seed{cfg.seed + repeat}-lr{lr_per_256:g}", changes)


def nested_run_config(cfg: FinetuneConfig, subdirectory: str, overrides: dict[str, Any]) -> FinetuneConfig:
    """Return the settings of a nested run in a subdirectory of the outer run's directory.

    ``overrides`` are settings by dotted name. A nested run has no MLflow of its own: the outer run's uploader delivers it.
    """
    tree: dict[str, Any] = cfg.model_dump() | {"trials": None, "cross_validation": None}
    if "ignore_id" not in cfg.data.model_fields_set:
        del tree["data"]["ignore_id"]  # a nested run is asked for it as the outer run is
    nested = {"run.dir": f"{cfg.run.dir}/{subdirectory}", "run.fresh": False, "tracking.uri": None}
    for name, value in (overrides | nested).items():
        set_by_dotted_key(tree, name, value)
    return cfg.from_nested(tree, subdirectory)


def _plan_run(cfg: FinetuneConfig, ranks: int) -> FinetunePlan:
    task = find_task(cfg.task)
    check_other_sections(cfg, tuple(TASKS.values()))
    check_settings(cfg, task)
    selection_metric = find_selection_metric(cfg, task)
    init_source = _inspect_init_source(cfg)
    card = None if init_source is None else init_source.card
    cfg, replacement_note = _replace_model(cfg, card)
    check_export_fits(cfg, task, card)
    encoder, resized_from = _resolve_encoder_card(cfg, task, card)
    plan = build_stage_plan(
        FinetunePlan,
        cfg,
        ranks,
        source_card=card,
        source_notes=(*_describe_init(cfg, init_source), *replacement_note),
        task=task,
        encoder=encoder,
        resized_from=resized_from,
    )
    label_reader = task.make_label_reader(cfg.data, plan.dataset)
    classes = _resolve_classes(plan.dataset, cfg, task) if task.predicts_classes else ()
    for source in plan.training_set.sources[1:]:
        if task.predicts_classes and source.dataset.classes not in {None, classes}:
            raise DataError(
                f"{source.dataset.folder} (data.mix) has other classes than {plan.dataset.folder}: index it with the "
                f"same names in the same order, or without labels"
            )
        task.make_label_reader(cfg.data, source.dataset)
    if label_reader is not None:
        for source in plan.training_set.sources:
            find_image_member(source.locate_sample(source.first_id), label_reader.field, cfg.data.decode_version)
    check_mixup_pairing(cfg, plan.microbatch_size)
    digests = _evaluation_science(plan.dataset, cfg, classes) | ({} if card is None else {"init": card.sha256})
    teacher = _inspect_teacher(cfg, classes, plan.mean, plan.std)
    digests |= {} if teacher is None else {"teacher": teacher.card.sha256}
    class_weights = _resolve_class_weights(cfg, plan, classes)
    encoder |= {"classes": task.num_encoder_outputs(classes)}
    plan = replace(
        plan,
        inherited_science=plan.inherited_science | add_inherited_prefix(digests),
        encoder=encoder,
        classes=classes,
        class_weights=class_weights,
        init_source=init_source,
        teacher=teacher,
        label_reader=label_reader,
        selection_metric=selection_metric,
    )
    _check_model(plan)
    if is_run_begun(cfg):  # its labels and its split val are looked at before its first start only
        return plan
    check_evaluation_data(cfg, plan.dataset)
    label_lines = check_labels(cfg, task, plan.training_set, label_reader, classes)
    return replace(plan, label_lines=label_lines)


def _check_model(plan: FinetunePlan) -> None:
    """Raise ConfigError if the plan's encoder, or its model, does not support the settings."""
    cfg, encoder, backbone = plan.cfg, plan.encoder, plan.backbone
    check_distillation_token(cfg, parse_encoder_card(encoder, "model"))
    check_split_batch_norm(cfg, encoder.get("timm") or encoder["name"], has_batch_norm=plan.has_batch_norm)
    if backbone is not None:
        check_backbone_pooling(backbone, cfg)
    plan.task.check_model(plan)
    if backbone is not None:
        check_backbone_supports_settings(backbone, cfg)


def _inspect_init_source(cfg: FinetuneConfig) -> PretrainedSource | None:
    """Return the weights to start from: an export, or foreign weights named by init_name.

    Raises: ConfigError, ExportError.
    """
    if cfg.init is None:
        if cfg.init_name is not None:
            raise ConfigError(
                f"init_name={cfg.init_name} says what init is, and init is null; set init, or leave it out"
            )
        return None
    path = Path(cfg.init)
    is_export = read_with_timeout(path, cfg.data.stall_timeout_seconds, (path / "card.json").exists)
    return inspect_pretrained(path, None if is_export else cfg.init_name, cfg.data)


def _describe_init(cfg: FinetuneConfig, init_source: PretrainedSource | None) -> tuple[str, ...]:
    """Return sentences about the weights to start from, and about what normalises the images."""
    if init_source is None:
        return ()
    return init_source.notes or (f"those of {cfg.init}, whose mean and std normalise the images",)


def _evaluation_science(dataset: Dataset, cfg: FinetuneConfig, classes: tuple[str, ...]) -> dict[str, str]:
    """Return the science of evaluation: digest of the split, classes, and the cadence with early stopping."""
    cadence = {} if cfg.early_stopping is None else {"evaluate_every": str(cfg.evaluate_every)}
    return {"val": dataset.samples_digest(eval_split(cfg.data).split), "classes": ", ".join(classes)} | cadence


def _resolve_encoder_card(
    cfg: FinetuneConfig, task: Task, card: Card | None
) -> tuple[dict[str, Any], int | tuple[int, int] | None]:
    """Return the encoder's card (the export's or the model's from scratch) and the image size it is resized from."""
    data = cfg.data
    if cfg.model is not None and cfg.backbone is not None:
        raise ConfigError("model and backbone exclude each other: an encoder of foveal's, or a model of timm as it is")
    if card is None:
        if cfg.backbone is not None:
            return backbone_card(cfg.backbone, data.image_size, data.channels), None
        if cfg.model is None:
            raise ConfigError(
                "model is missing: without init, the encoder from scratch must be stated (model.name, such as "
                "model.name=vit_small_patch16_224, or backbone)"
            )
        return encoder_card(cfg.model, data.image_size, data.channels, pooling=task.resolve_pooling(cfg)), None
    exported = parse_encoder_card(card.encoder, f"{cfg.init}/card.json")
    _check_matches_export(cfg, exported)
    size = {"image_size": data.to_dict()["image_size"]}
    if isinstance(exported, BackboneCard):
        check_resizable(exported, data.image_size, f"the export {cfg.init}")
        return card.encoder | size, None if exported.image_size == data.image_size else exported.image_size
    pooling = {"pooling": task.resolve_pooling(cfg)}
    return card.encoder | pooling | size, exported.trained_size_if_different(data.image_size)


def _replace_model(cfg: FinetuneConfig, card: Card | None) -> tuple[FinetuneConfig, tuple[str, ...]]:
    """Return the settings without the file's model if ``init``, on the command line, is of another, and a note on it.

    A model that the export agrees with stays: it is science of runs that began with it.
    """
    if card is None or (cfg.model is None and cfg.backbone is None):
        return cfg, ()
    without_model = cfg.without_replaced_model()
    if without_model is cfg:
        return cfg, ()
    try:
        _check_matches_export(cfg, parse_encoder_card(card.encoder, f"{cfg.init}/card.json"))
    except ExportError:
        section = "backbone" if cfg.model is None else "model"
        return without_model, (f"the encoder is that of {cfg.init}, in place of the config's {section}",)
    return cfg, ()


def _check_matches_export(cfg: FinetuneConfig, export_card: EncoderCard | BackboneCard) -> None:
    """Raise ExportError if the config states a model that differs from the export."""
    stated: dict[str, Any] = {"channels": cfg.data.channels}
    name_field, wrong_setting = ("timm", "model") if isinstance(export_card, BackboneCard) else ("name", "backbone")
    if getattr(cfg, wrong_setting) is not None:
        raise ExportError(
            f"the export {cfg.init} is a {getattr(export_card, name_field)}, which {wrong_setting} does not say; leave "
            f"it out ({wrong_setting}=null)"
        )
    if cfg.backbone is not None:
        stated["timm"] = cfg.backbone
    if cfg.model is not None:
        stated |= {name: value for name, value in resolve_sizes(cfg.model).to_dict().items() if name != "name"}
    for name, value in stated.items():
        if getattr(export_card, name) != value:
            section = "backbone" if name == "timm" else "model"
            setting = f"{section}.{name}" if section == "model" else section
            remedy = f"leave {setting} out, or set {section}=null"
            if name == "channels":
                remedy = f"set data.channels={export_card.channels}"
            raise ExportError(
                f"the export {cfg.init} has {name} {getattr(export_card, name)}, the config says {value}; they must be "
                f"equal: {remedy}"
            )


def _resolve_class_weights(cfg: FinetuneConfig, plan: FinetunePlan, classes: tuple[str, ...]) -> tuple[float, ...]:
    """Return the weight of each class in the loss. Raises: ConfigError, DataError."""
    weights = cfg.class_weights
    if weights is None:
        return (1.0,) * len(classes)
    if weights != "balanced":
        if len(weights) != len(classes):
            raise ConfigError(
                f"class_weights has {len(weights)} weights for {len(classes)} classes; give one for each, by label"
            )
        if not all(weight > 0 for weight in weights):
            raise ConfigError(f"class_weights={list(weights)}: a weight is above 0, or a batch may weigh nothing")
        return weights
    if cfg.data.mix:
        raise ConfigError(
            "class_weights=balanced counts the classes of data.path alone; with data.mix give a list of weights"
        )
    source = plan.training_set.sources[0]
    labels = source.dataset.labels(source.split)
    labels = labels if source.subset.split_positions is None else labels[source.subset.split_positions]
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if not counts.all():
        empty = classes[int(counts.argmin())]
        raise DataError(
            f"{source.dataset.folder}: class '{empty}' has no sample to train on, which class_weights=balanced needs"
        )
    return tuple((counts.sum() / (len(classes) * counts)).tolist())


def _resolve_classes(dataset: Dataset, cfg: FinetuneConfig, task: Task) -> tuple[str, ...]:
    """Return the names of the classes. Raises: DataError if there are none, or labels of the index are not theirs."""
    if dataset.classes is None:
        raise DataError(
            f"{dataset.folder}: its samples have no classes to learn, and task={task.name} needs them; pack class folders or "
            f"a table with --label-column, or index shards that hold .cls members"
        )
    for split in (cfg.data.train, eval_split(cfg.data).split) if task.has_index_labels else ():
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
    """Return the teacher's weights, with the student's classes, channels and pixel statistics. Raises: ExportError."""
    if cfg.teacher is None:
        return None
    source = inspect_pretrained(Path(cfg.teacher.init), None, cfg.data)
    card = source.card
    if not card.encoder.get("classes"):
        raise ExportError(f"the teacher {cfg.teacher.init} has no classification head; give the export of a classifier")
    channels = parse_encoder_card(card.encoder, f"{cfg.teacher.init}/card.json").channels
    for name, teacher_value, student_value in (
        ("classes", card.classes, classes),
        ("channels", channels, cfg.data.channels),
        ("mean", card.mean, mean),
        ("std", card.std, std),
    ):
        if teacher_value != student_value:
            raise ExportError(
                f"the teacher {cfg.teacher.init} has {name} {_short(teacher_value)}, the student "
                f"{_short(student_value)}; they must be equal"
            )
    return source


def _short(value: object) -> str:
    """Return the value as text of at most 60 characters and an ellipsis."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
