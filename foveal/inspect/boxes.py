"""A sheet of boxes: for every image what is there, and beside it what was found. B images, C channels."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveal.inspect.image_grid import make_image_grid
from foveal.inspect.segmentation import make_class_palette

MIN_IMAGE_SIDE = 320  # pixels; smaller images are enlarged by a whole factor, so that names hide little
_LINE = 11  # pixels of a line of text


def draw_box_grid(
    images: Tensor, ground_truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], class_names: Sequence[str]
) -> Image.Image:
    """One row per image: with the boxes that are there, and with those that were found.

    ``images`` uint8 [B, C, H, W]. Rows of ``there`` [M, 5] are left, top, right, bottom in pixels of the image, and the
    class; those of ``found`` [N, 6] have a score too, which is written in percent. ``names`` are the K classes'.
    """
    drawn = [_draw_boxes(images.detach().cpu(), rows, class_names) for rows in (ground_truth, predicted)]
    return make_image_grid(drawn)


def _draw_boxes(images: Tensor, boxes: Sequence[np.ndarray], names: Sequence[str]) -> Tensor:
    """The images uint8 [B, 3, H, W] with boxes drawn on them, enlarged if they are small."""
    palette, font = [tuple(colour) for colour in make_class_palette(len(names)).tolist()], ImageFont.load_default()
    scale, drawn = max(1, math.ceil(MIN_IMAGE_SIDE / max(images.shape[2:]))), []
    for image, rows in zip(images, boxes, strict=True):
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(picture)
        for left, top, right, bottom, label, *score in rows.tolist():
            first = left * scale, top * scale
            last = max(first[0], right * scale - 1), max(first[1], bottom * scale - 1)
            colour, name = palette[int(label)], names[int(label)].encode("ascii", "replace").decode()
            words = " ".join([name, *(f"{100 * each:.0f}" for each in score)])
            pen.rectangle((first, last), outline=colour)
            above = first[0], max(0, first[1] - _LINE)
            pen.rectangle(pen.textbbox(above, words, font=font), fill=colour)
            pen.text(above, words, fill=(0, 0, 0), font=font)
        drawn.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(drawn)
