"""A grid of segmentations: per image a row of the image, and the image under its mask and under the prediction.

B images, C channels, H x W pixels, K classes.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from foveal.data.image.label_drawing import GREY, blend_masks, make_class_palette
from foveal.inspect.image_grid import draw_image_grid

_MAX_LEGEND_CLASSES = 40


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
    colors = [(name, tuple(color)) for name, color in zip(class_names, palette.tolist(), strict=True)]
    legend = colors[:_MAX_LEGEND_CLASSES]
    if bool((ground_truth < 0).any()):
        legend.append(("no class", (GREY, GREY, GREY)))
    left_out = len(colors) - _MAX_LEGEND_CLASSES
    notes = [f"{left_out} more classes have no entry here."] if left_out > 0 else []
    return draw_image_grid(columns, title=title, legend=legend, notes=notes)
