"""A grid of segmentations: per image a row of the image, and the image under its mask and under the prediction.

B images, C channels, H x W pixels, K classes.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveal.data.image.label_drawing import blend_masks, make_class_palette
from foveal.inspect.image_grid import GAP, MIN_IMAGE_SIDE, make_image_grid

_LINE_HEIGHT = 14  # pixels, of the legend
_SWATCH = 10  # pixels: side of the colour square before a name
_MAX_LEGEND_CLASSES = 40


def draw_segmentation_grid(
    images: Tensor, ground_truth: Tensor, predicted: Tensor, class_names: Sequence[str]
) -> Image.Image:
    """Draw one row per image: the image, its mask, the prediction; below them a legend of the classes' colours.

    ``images`` uint8 [B, C, H, W]; ``ground_truth`` and ``predicted`` are integers [B, H, W], negative for pixels
    without a class, which are drawn grey.
    """
    images, ground_truth, predicted = (tensor.detach().cpu() for tensor in (images, ground_truth, predicted))
    palette = make_class_palette(len(class_names))
    columns = [
        images,
        blend_masks(images, ground_truth.long(), palette),
        blend_masks(images, predicted.long(), palette),
    ]
    legend_width = 3 * max(MIN_IMAGE_SIDE, images.shape[3])
    entries, num_lines = _layout_legend(class_names[:_MAX_LEGEND_CLASSES], legend_width)
    grid = make_image_grid(columns, bottom_margin=GAP + num_lines * _LINE_HEIGHT)
    draw, legend_top = ImageDraw.Draw(grid), grid.height - num_lines * _LINE_HEIGHT
    for (name, x, line), colour in zip(entries, palette.tolist(), strict=False):
        y = legend_top + line * _LINE_HEIGHT
        draw.rectangle((x, y + 2, x + _SWATCH, y + 2 + _SWATCH), fill=tuple(colour))
        draw.text((x + _SWATCH + 3, y), name, fill=(0, 0, 0))
    return grid


def _layout_legend(names: Sequence[str], width: int) -> tuple[list[tuple[str, int, int]], int]:
    """Return (name in ASCII, x in pixels, line) per class, and the number of lines."""
    font = ImageFont.load_default()
    entries: list[tuple[str, int, int]] = []
    x, line = 0, 0
    for name in names:
        ascii_name = name.encode("ascii", "replace").decode()  # every default font has ASCII
        entry_width = _SWATCH + 3 + int(font.getlength(ascii_name)) + 10
        if x and x + entry_width > width:
            x, line = 0, line + 1
        entries.append((ascii_name, x, line))
        x += entry_width
    return entries, line + 1 if names else 0
