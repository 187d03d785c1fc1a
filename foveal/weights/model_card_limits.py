"""The section Limits of a model card: what was not tested, what is not known, and what others compute otherwise."""

from foveal.errors import ConfigError
from foveal.models.backbone import format_image_size, parse_encoder_card
from foveal.weights.card import Card, eval_pixels_from_card, evaluated_metrics, settings_of, task_of
from foveal.weights.markdown import code, escape
from foveal.weights.model_card_facts import ModelCardFacts
from foveal.weights.timm_folder import explain_not_timm


def describe_limits(card: Card, facts: ModelCardFacts) -> list[str]:
    """Return sentences in Markdown."""
    return [
        *_evaluation_limits(card, facts),
        *_pixel_limits(card),
        *_class_limits(card),
        *_origin_limits(card, facts),
        *_timm_limits(card),
    ]


def _evaluation_limits(card: Card, facts: ModelCardFacts) -> list[str]:
    if not evaluated_metrics(card, facts.student):
        return ["These weights were not evaluated on images apart from those that they were trained on."]
    data = facts.evaluation_data
    where = "one data set" if data is None else f"the split {code(data.split)} of {escape(data.name)}"
    limits = [f"The metrics are of {where}; images from elsewhere were not tested."]
    settings = settings_of(card)
    chosen_by = settings.get("early_stopping.metric")
    if chosen_by:
        limits.append(
            f"The step was chosen by {code(str(chosen_by))}, so that its value is better than on images that chose "
            f"nothing."
        )
    return limits


def _pixel_limits(card: Card) -> list[str]:
    try:
        parse_encoder_card(card.encoder, "card.json")
    except ConfigError:
        return []
    pixels = eval_pixels_from_card(card)
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (pixels.mean, pixels.std))
    size = format_image_size(pixels.image_hw)
    limits = [
        f"Pixels in \\[0, 1\\] are normalised with mean {mean} and std {std}; other values give other outputs.",
        f"Images are of {size} pixels (height x width); other sizes were not tested.",
    ]
    if pixels.eval_hw != pixels.image_hw:
        limits[1] = (
            f"Images are of {size} pixels (height x width) in training and of {format_image_size(pixels.eval_hw)} in "
            f"evaluation; other sizes were not tested."
        )
    if pixels.bit_depth is not None:
        limits.append(f"Images stored in 16 bits use {pixels.bit_depth} of them, which foveal knows and timm does not.")
    return limits


def _class_limits(card: Card) -> list[str]:
    task = task_of(card)
    if task == "classification":
        return ["An image of none of the classes gets one of them too."]
    return ["The classes are the only ones that this model knows."] if card.classes and task else []


def _origin_limits(card: Card, facts: ModelCardFacts) -> list[str]:
    limits = []
    for source, begins in (("init", "Training began from weights"), ("teacher", "The targets are those of a teacher")):
        if digest := card.science.get(f"inherited.{source}"):
            limits.append(f"{begins} (sha256 {code(str(digest))}) whose data and licence are not in this card.")
    if facts.license is None and facts.license_name is None:
        limits.append("No licence was stated (settings `card`).")
    return limits


def _timm_limits(card: Card) -> list[str]:
    reason = explain_not_timm(card)
    if reason is not None:
        return [f"timm alone does not compute the outputs of this model: {escape(reason)}."]
    return [
        "timm computes the same outputs of the same pixels.",
        (
            "timm makes other pixels of an image file, shifted by about half a pixel: its transform resizes, rounds and then "
            "crops; foveal's crops first, and may decode a JPEG at a fraction of its size."
        ),
    ]
