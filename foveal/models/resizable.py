"""Weights of timm's models that hold for one image size alone: positions, bias tables, maps over patches."""

import functools
from typing import Any

from foveal.config import height_and_width
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import BackboneCard, build_meta_backbone, format_image_size


def check_resizable(card: BackboneCard, image_size: int | tuple[int, int], source: str) -> None:
    """Raise ExportError if a timm model's weights do not fit another image size, ConfigError if timm cannot build it.

    Equal shapes do not suffice: 24 x 24 and 18 x 32 patches have position tables of one shape.
    """
    trained_hw, new_hw = height_and_width(card.image_size), height_and_width(image_size)
    new, trained = (_shapes(card.timm, size, card.channels) for size in (image_size, card.image_size))
    changed = [name for name in trained if new.get(name) != trained[name]]
    if not changed and trained_hw[0] * new_hw[1] != trained_hw[1] * new_hw[0]:
        changed = find_weights_of_image_size(card.timm, card.image_size, card.channels)
    if changed:
        raise ExportError(
            f"{source} is a {card.timm} of images of {format_image_size(card.image_size)} pixels and has weights of "
            f"that size alone ({', '.join(changed[:3])}); data.image_size is {format_image_size(image_size)}"
        )


def find_weights_of_image_size(name: str, image_size: int | tuple[int, int], channels: int) -> list[str]:
    """Return the weights whose shape follows the image size: those that differ at twice the sides.

    Empty if timm cannot build the model for that size.
    """
    height, width = height_and_width(image_size)
    trained = _shapes(name, image_size, channels)
    try:
        doubled = _shapes(name, (2 * height, 2 * width), channels)
    except ConfigError:
        return []
    return [weight for weight in trained if doubled.get(weight) != trained[weight]]


@functools.cache
def _shapes(name: str, image_size: int | tuple[int, int], channels: int) -> dict[str, Any]:
    return {
        weight: value.shape for weight, value in build_meta_backbone(name, image_size, channels).state_dict().items()
    }
