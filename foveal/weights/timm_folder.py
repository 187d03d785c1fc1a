"""The file ``config.json`` that makes an export a folder of timm's: ``timm.create_model("local-dir:PATH", pretrained=True)``.

Its form is that of timm's models on the Hugging Face hub (timm 1.0: ``timm/models/_hub.py``). timm reads the weights
from ``model.safetensors`` beside it, and nothing else of an export.
"""

from typing import Any

from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import parse_encoder_card
from foveal.models.timm_config import describe_timm_model, explain_altered_weights
from foveal.weights.card import Card, eval_pixels_from_card


def build_timm_config(card: Card) -> dict[str, Any]:
    """Return timm's description of an export's encoder, with its head if the head is in ``model.safetensors``.

    Raises: ExportError with the reason of ``explain_encoder_not_timm``.
    """
    if reason := explain_encoder_not_timm(card):
        raise ExportError(f"timm cannot load this model: {reason}")
    spec = parse_encoder_card(card.encoder, "card.json")
    model, pixels = describe_timm_model(spec), eval_pixels_from_card(card)
    config: dict[str, Any] = {"architecture": model.architecture, "num_classes": spec.classes}
    if model.num_features is not None:  # timm reads it from the model, others from here
        config["num_features"] = model.num_features
    if spec.classes and len(card.classes) == spec.classes:
        config["label_names"] = list(card.classes)
    # num_classes is in pretrained_cfg, where timm reads it too: transformers passes its own beside model_args.
    config["model_args"] = {name: value for name, value in model.model_args.items() if name != "num_classes"}
    config["pretrained_cfg"] = {
        "custom_load": False,
        "input_size": [pixels.channels, *pixels.image_hw],
        "fixed_input_size": model.fixed_input_size,
        "interpolation": pixels.interpolation,
        "crop_pct": pixels.crop_ratio,
        "crop_mode": "center",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "num_classes": spec.classes,
        "pool_size": None,
        "first_conv": model.first_conv,
        "classifier": model.classifier,
    }
    return config


def explain_encoder_not_timm(card: Card) -> str | None:
    """Return why timm alone cannot build an export's encoder or compute its outputs; None if it can."""
    try:
        spec = parse_encoder_card(card.encoder, "card.json")
        describe_timm_model(spec)
        return explain_altered_weights(spec)
    except ConfigError as error:
        return str(error)


def explain_not_timm(card: Card) -> str | None:
    """Return why timm alone cannot build an export's module or compute its outputs; None if it can.

    Of a module with a head in ``head.safetensors`` timm builds the encoder: ``explain_encoder_not_timm``.
    """
    if card.head is not None:
        return (
            f"timm has no head for {card.head.get('kind')} like that in head.safetensors; it builds the encoder alone"
        )
    return explain_encoder_not_timm(card)
