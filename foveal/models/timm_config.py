"""timm's own description of an exported encoder: what builds it without foveal, and where timm's loader would fail."""

import math
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor

from foveal.models.backbone import BackboneCard, build_meta_backbone
from foveal.models.timm_args import timm_backbone_args
from foveal.models.vit import EncoderCard, resolve_sizes_for_image, timm_encoder_args


@dataclass(frozen=True, slots=True)
class TimmModel:
    """What ``timm.create_model`` needs to build a model, and what timm's loader of weights has to know of it.

    ``model_args`` are the arguments beside the name. ``first_conv`` and ``classifier``: names of the modules that read
    the channels and write the classes, which timm adapts to other numbers of either. ``fixed_input_size``: whether the
    model takes images of its own size only.
    """

    architecture: str
    model_args: dict[str, Any]
    num_features: int | None
    first_conv: str | tuple[str, ...] | None
    classifier: str | tuple[str, ...] | None
    fixed_input_size: bool


def describe_timm_model(card: EncoderCard | BackboneCard) -> TimmModel:
    """Return timm's description of the model of an encoder's card.

    Raises: ConfigError if timm has no such model, or if the sizes do not fit each other.
    """
    if isinstance(card, BackboneCard):
        name, is_encoder = card.timm, False
        args = timm_backbone_args(*card.build_args, card.classes)
        num_features = getattr(build_meta_backbone(*card.build_args, card.classes), "num_features", None)
    else:
        sizes = resolve_sizes_for_image(card, card.image_size)
        name, is_encoder, num_features = sizes.name, True, sizes.width
        args = timm_encoder_args(sizes, card.image_size, card.channels, pooling=card.pooling, num_classes=card.classes)
    timms: Any = timm.get_pretrained_cfg(name)
    return TimmModel(
        architecture=name.partition(".")[0],  # the tag names weights of others
        model_args=args,
        num_features=num_features,
        first_conv=getattr(timms, "first_conv", None),  # of a name that timm describes no weights of
        classifier=getattr(timms, "classifier", None),
        fixed_input_size=is_encoder or getattr(timms, "fixed_input_size", False),
    )


def explain_altered_weights(card: EncoderCard | BackboneCard) -> str | None:
    """Return how timm's loader would alter the weights of a model that timm builds; None if it takes them as they are.

    The loader resamples a table of relative position biases for a window that is not square, and takes the table for
    that of a square window if the number of its rows is a square number. Raises: ConfigError, as ``build_backbone``.
    """
    if isinstance(card, EncoderCard):
        return None  # no encoder of foveal's has such a table
    for name, module in build_meta_backbone(*card.build_args, card.classes).named_modules():
        table, window = getattr(module, "relative_position_bias_table", None), getattr(module, "window_size", None)
        if not isinstance(table, Tensor) or table.ndim != 2 or not isinstance(window, tuple):
            continue
        rows, columns = window
        num_offsets = (2 * rows - 1) * (2 * columns - 1)
        if rows != columns and math.isqrt(num_offsets) ** 2 == num_offsets:
            return (
                f"timm takes the relative position biases of {name}, of a window of {rows} x {columns} patches, for "
                f"those of a square window, and resamples them"
            )
    return None
