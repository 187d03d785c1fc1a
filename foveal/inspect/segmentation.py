"""A grid of segmentations: per image a row of the image, and the image under its mask and under the prediction.

B images, C channels, H x W pixels, K classes.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from foveal.data.image.label_drawing import GREY, blend_masks, make_class_palette
from foveal.inspect.image_grid import Color, draw_image_grid

_MAX_LEGEND_CLASSES = 40
_MAX_PALETTE_CLASSES = 255  # the id behind them is that of pixels without a class


def draw_segmentation_grid(
    images: Tensor, ground_truth: Tensor, predicted: Tensor, class_names: Sequence[str], *, title: str = ""
) -> Image.Image:
    """Draw one row per image: the image, its mask, the prediction; below them a legend of the classes' colours.

    ``images`` uint8 [B, C, H, W]; ``ground_truth`` and ``predicted`` are integers [B, H, W], negative for pixels
    without a class, which are drawn grey.
    """
    images, ground_truth, predicted = (tensor.detach().cpu() for tensor in (images, ground_truth, predicted))
    palette = make_class_palette(len(class_names))
    columns = {
        "image": images,
        "ground truth": blend_masks(images, ground_truth.long(), palette),
        "predicted": blend_masks(images, predicted.long(), palette),
    }
    legend, notes = _legend_and_notes(class_names)
    if bool((ground_truth < 0).any()):
        legend.append(("no class", (GREY, GREY, GREY)))
    return draw_image_grid(columns, title=title, legend=legend, notes=notes)


def draw_predicted_mask(pixels: Tensor, ids: Tensor, class_names: Sequence[str]) -> Image.Image:
    """Draw an image, uint8 [C, H, W], and beside it the image under its predicted mask, integers [H, W]."""
    blended = blend_masks(pixels[None], ids[None].long(), make_class_palette(len(class_names)))
    legend, notes = _legend_and_notes(class_names)
    return draw_image_grid({"image": pixels[None], "predicted": blended}, legend=legend, notes=notes)


def encode_mask(ids: np.ndarray, num_classes: int) -> bytes:
    """Return a mask of class ids [H, W] as PNG: with the classes' colours as palette, or in 16 bits for many classes.

    ``outside_id`` is grey. A mask is read as its ids, whatever its palette.
    """
    if num_classes <= _MAX_PALETTE_CLASSES:
        image = Image.fromarray(ids.astype(np.uint8))
        colors = make_class_palette(num_classes).tolist()
        image.putpalette([value for color in colors for value in color] + [GREY] * 3 * (256 - num_classes))
    else:
        image = Image.fromarray(ids.astype(np.uint16))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def outside_id(num_classes: int) -> int:
    """Return the id of pixels without a class in ``encode_mask``: 255, or 65535 in 16 bits."""
    return 255 if num_classes <= _MAX_PALETTE_CLASSES else 65535


def _legend_and_notes(class_names: Sequence[str]) -> tuple[list[tuple[str, Color]], list[str]]:
    """Return names and colours of the first classes, and a note on how many have no entry."""
    palette = make_class_palette(len(class_names)).tolist()
    colors: list[tuple[str, Color]] = [(name, tuple(color)) for name, color in zip(class_names, palette, strict=True)]
    left_out = len(colors) - _MAX_LEGEND_CLASSES
    notes = [f"{left_out} more classes have no entry here."] if left_out > 0 else []
    return colors[:_MAX_LEGEND_CLASSES], notes
