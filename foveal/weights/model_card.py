"""``README.md`` of an export: a model card with Hugging Face's front matter, made of facts alone.

The card and ``ModelCardFacts`` decide every byte. What nobody has stated or measured is not in it; what is missing is
said under Limits.
"""

from collections.abc import Sequence
from typing import Any

from foveal.strict_yaml import dump_yaml
from foveal.weights.card import Card, evaluated_metrics, settings_of, task_of
from foveal.weights.markdown import code, code_cell, escape, one_line, table
from foveal.weights.model_card_facts import NO_FACTS, DataFacts, ModelCardFacts
from foveal.weights.model_card_limits import describe_limits
from foveal.weights.model_card_lineage import lineage_section
from foveal.weights.model_card_loading import loading_section
from foveal.weights.timm_folder import explain_not_timm

README = "README.md"
_MOST_CLASSES = 30  # in the table of classes
_PIPELINE_TAGS = {  # Hugging Face's names of tasks
    "classification": "image-classification",
    "multilabel": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    None: "image-feature-extraction",
}
_METRIC_IDS = {"top1": "accuracy", "f1": "f1", "miou": "mean_iou"}  # Hugging Face's, of what foveal computes
_STAGES = {
    "pretrain": "pretrained as a masked autoencoder",
    "distill": "distilled from a teacher",
    "finetune": "fine-tuned",
}
# Settings that describe a recipe, in the order of the table; those that a stage has not, or that are null, are left out.
_RECIPE = (
    *("epochs", "batch.global_size", "optim.name", "optim.lr_per_256", "optim.min_lr", "optim.warmup_epochs"),
    *("optim.schedule", "optim.weight_decay", "optim.layer_decay", "optim.max_grad_norm", "data.image_size"),
    *("data.augment.scale", "data.augment.hflip", "data.augment.rand_augment.ops", "data.samples_per_class"),
    *("mask_ratio", "mask_strategy", "target", "norm_pix", "image_loss_weight", "method", "distance", "temperature"),
    *("label_weight", "teacher_name", "init_name", "pooling", "freeze_encoder", "drop_path", "dropout"),
    *("label_smoothing", "mixup", "cutmix", "random_erasing", "ema_decay", "early_stopping.metric", "seed"),
)


def build_model_card(card: Card, facts: ModelCardFacts = NO_FACTS) -> str:
    """Return the model card of an export as Markdown."""
    limits = "".join(f"- {limit}\n" for limit in describe_limits(card, facts))
    sections = [
        _front_matter(card, facts),
        _summary(card, facts),
        f"## Model\n\n{_model_table(card, facts)}{_class_table(card)}",
        loading_section(card),
        f"## Data\n\n{_data_section(card, facts)}",
        lineage_section(card),
        f"## Training\n\n{_recipe_section(card)}",
        f"## Results\n\n{_results_section(card, facts)}",
        f"## Limits\n\n{limits}",
    ]
    return "\n".join(filter(None, sections))


def _front_matter(card: Card, facts: ModelCardFacts) -> str:
    tag = _PIPELINE_TAGS.get(task_of(card))
    library = "timm" if explain_not_timm(card) is None else "foveal"
    metrics = {name.partition("_")[2] for name in evaluated_metrics(card, facts.student)}
    fields: dict[str, Any] = {
        "license": facts.license or (facts.license_name and "other"),
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "library_name": library,
        "pipeline_tag": tag,
        "tags": ["foveal", "timm", *([tag] if tag else [])],
        "metrics": [label for name, label in _METRIC_IDS.items() if name in metrics],
    }
    stated = {name: one_line(value) if isinstance(value, str) else value for name, value in fields.items() if value}
    return f"---\n{dump_yaml(stated)}---\n"


def _summary(card: Card, facts: ModelCardFacts) -> str:
    name, task = _architecture(card), task_of(card)
    kind = f"for {task}" if task else "as an encoder"
    title = f"# {escape(name)} {kind}\n"
    stage = _STAGES.get(card.stage, escape(card.stage))
    version = card.versions.get("foveal")
    sentence = f"A {code(name)} of timm, {stage} with foveal{f' {escape(version)}' if version else ''}"
    paragraphs = [f"{sentence}: the weights after step {card.step}.\n"]
    for paragraph in (facts.model_description or "").split("\n\n"):
        paragraphs += [f"{escape(paragraph)}\n"] if paragraph.strip() else []
    return "\n".join([title, *paragraphs])


def _architecture(card: Card) -> str:
    return str(card.encoder.get("timm") or card.encoder.get("name") or "model")


def _model_table(card: Card, facts: ModelCardFacts) -> str:
    encoder, task = card.encoder, task_of(card)
    sizes = [(name, encoder[name]) for name in ("patch", "width", "depth", "heads", "mlp_ratio", "registers")
             if name in encoder]  # fmt: skip
    size, channels = encoder.get("image_size"), encoder.get("channels")
    shape = " x ".join(map(str, size)) if isinstance(size, list | tuple) else f"{size} x {size}"
    outputs = f"outputs for {len(card.classes)} classes" if task else "one feature vector per image"
    if task in ("classification", "multilabel"):
        outputs = f"logits of {encoder.get('classes')} classes"
    license_text = facts.license_name or facts.license
    rows = [
        ("Architecture", code_cell(_architecture(card))),
        ("Sizes", escape(", ".join(f"{name} {_format_value(value)}" for name, value in sizes))),
        ("Positions", escape(str(encoder["positions"])) if encoder.get("positions") else ""),
        (
            "Pooling",
            {"token": "the class token", "avg": "the mean of the patches"}.get(str(encoder.get("pooling")), ""),
        ),
        (
            "Input",
            f"{'1 channel' if channels == 1 else f'{channels} channels'}, {escape(shape)} pixels (height x width)",
        ),
        ("Output", outputs),
        ("Developed by", escape(facts.developers or "")),
        ("License", escape(license_text or "")),
    ]
    return table(("", ""), [row for row in rows if row[1]])


def _class_table(card: Card) -> str:
    if not card.classes:
        return ""
    rows = [(str(number), escape(name)) for number, name in enumerate(card.classes[:_MOST_CLASSES])]
    rest = len(card.classes) - len(rows)
    more = f"\n{rest} more classes are in card.json.\n" if rest else ""
    return f"\n{table(('Output', 'Class'), rows)}{more}"


def _data_section(card: Card, facts: ModelCardFacts) -> str:
    """Return the data sets by name and number of images, and the digests that identify them."""
    science = card.science
    rows = [_data_row("training", data) for data in facts.training_data]
    if facts.evaluation_data is not None:
        rows.append(_data_row("evaluation", facts.evaluation_data))
    text = (
        table(("Use", "Data set", "Split", "Images"), rows)
        if rows
        else "The names of the data sets were not recorded.\n"
    )
    digests = [("training", science.get("inherited.data")), ("evaluation", science.get("inherited.val"))]
    lines = [
        f"- sha256 over keys, sizes and labels of the {use} split: {code(str(digest))}\n"
        for use, digest in digests
        if digest
    ]
    return "\n".join([text, "".join(lines)]) if lines else text


def _data_row(use: str, data: DataFacts) -> Sequence[str]:
    used = "" if data.num_used in (None, data.num_images) else f" ({data.num_used:,} used)"
    return use, escape(data.name), code_cell(data.split), f"{data.num_images:,}{used}"


def _recipe_section(card: Card) -> str:
    settings = settings_of(card)
    rows = [
        (code_cell(name), code_cell(_format_value(settings[name])))
        for name in _RECIPE
        if settings.get(name) not in (None, [], ())
    ]
    if not rows:
        return "The settings were not recorded.\n"
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in card.versions.items())
    made_with = f"\nVersions: {versions}.\n" if versions else ""
    return f"{table(('Setting', 'Value'), rows)}\nAll settings that can change a result are in card.json.\n{made_with}"


def _results_section(card: Card, facts: ModelCardFacts) -> str:
    metrics = evaluated_metrics(card, facts.student)
    if not metrics:
        return "No evaluation of these weights was recorded.\n"
    rows = [(code_cell(name), escape(_format_value(value))) for name, value in metrics.items()]
    data = facts.evaluation_data
    source = "" if data is None else f" `val_` and `fold_` are of the evaluation images of {escape(data.name)}."
    return f"{table(('Metric', 'Value'), rows)}\nMeasured with these weights.{source}\n"


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
