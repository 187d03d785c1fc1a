"""A grid of detections: per image the ground truth boxes, and the predicted boxes beside them. B images, C channels."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveal.data.image.label_drawing import make_class_palette
from foveal.inspect.image_grid import draw_image_grid

MIN_IMAGE_SIDE = 320  # pixels; smaller images are enlarged by an integer factor, so that labels cover little
_LINE_HEIGHT = 11  # pixels of a line of text


def draw_box_grid(
    images: Tensor,
    ground_truth: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    class_names: Sequence[str],
    *,
    title: str = "",
) -> Image.Image:
    """Draw one row per image: the ground truth boxes, then the predicted boxes.

    ``images`` uint8 [B, C, H, W]. Rows of ``ground_truth`` [M, 5] are (left, top, right, bottom, class) in pixels;
    rows of ``predicted`` [N, 6] have a score as well, which is drawn in percent.
    """
    boxes_by_column = {"ground truth": ground_truth, "predicted": predicted}
    columns = {name: draw_boxes(images.detach().cpu(), boxes, class_names) for name, boxes in boxes_by_column.items()}
    return draw_image_grid(columns, title=title, min_side=1)


def draw_boxes(images: Tensor, boxes: Sequence[np.ndarray], names: Sequence[str]) -> Tensor:
    """Return images uint8 [B, C, H, W] as [B, 3, H, W], enlarged if they are small, with boxes drawn on them.

    Rows of boxes are (left, top, right, bottom, class) in pixels, and may have a score, which is drawn in percent.
    """
    palette = [tuple(colour) for colour in make_class_palette(len(names)).tolist()]
    font = ImageFont.load_default()
    scale = max(1, math.ceil(MIN_IMAGE_SIDE / max(images.shape[2:])))
    annotated = []
    for image, rows in zip(images, boxes, strict=True):
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(picture)
        for left, top, right, bottom, label, *score in rows.tolist():
            top_left = left * scale, top * scale
            bottom_right = max(top_left[0], right * scale - 1), max(top_left[1], bottom * scale - 1)
            colour, name = palette[int(label)], names[int(label)].encode("ascii", "replace").decode()
            text = " ".join([*name.split(), *(f"{100 * value:.0f}" for value in score)])
            pen.rectangle((top_left, bottom_right), outline=colour)
            text_corner = top_left[0], max(0, top_left[1] - _LINE_HEIGHT)
            pen.rectangle(pen.textbbox(text_corner, text, font=font), fill=colour)
            pen.text(text_corner, text, fill="black" if _is_light(colour) else "white", font=font)
        annotated.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(annotated)


def _is_light(colour: tuple[int, ...]) -> bool:
    red, green, blue = colour
    return 0.3 * red + 0.6 * green + 0.1 * blue > 128  # the middle of the range
