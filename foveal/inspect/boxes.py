"""A sheet of boxes: for every image what is there, and beside it what was found. B images, C channels."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between pictures
SMALLEST = 192  # pixels; smaller images are enlarged by a whole factor, so that names can be read
_COLUMNS = 2  # pairs beside each other
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_TURN = 0.61803398875  # of the circle of colours, between one class and the next: no two near ones look alike


def box_sheet(
    images: np.ndarray, there: Sequence[np.ndarray], found: Sequence[np.ndarray], classes: Sequence[str]
) -> Image.Image:
    """Pairs of pictures of each image with its boxes, as they are and as they were found, two pairs to a row.

    ``images`` uint8 [B, C, H, W]. Rows of ``there`` [M, 5] are left, top, right, bottom in pixels of the image, and the
    class; those of ``found`` [N, 6] have a score too. There may be more rows than images.
    """
    scale = max(1, math.ceil(SMALLEST / max(images.shape[2:])))
    height, width = (side * scale + GAP for side in images.shape[2:])
    across, down = 2 * min(_COLUMNS, len(images)), -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (across * width - GAP, down * height - GAP), _WHITE)
    for number, image in enumerate(images):
        for side, rows in enumerate((there[number], found[number])):
            place = (2 * (number % _COLUMNS) + side) * width, number // _COLUMNS * height
            sheet.paste(_drawn(image, rows, classes, scale), place)
    return sheet


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class, from 0 to 255."""
    red, green, blue = colorsys.hsv_to_rgb(label * _TURN % 1, 0.7, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _drawn(image: np.ndarray, rows: np.ndarray, classes: Sequence[str], scale: int) -> Image.Image:
    pixels = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    for left, top, right, bottom, label, *score in rows.tolist():
        first, colour = (left * scale, top * scale), colour_of(int(label))
        last = max(first[0], right * scale - 1), max(first[1], bottom * scale - 1)
        pen.rectangle((first, last), outline=colour)
        words = " ".join([classes[int(label)], *(f"{100 * each:.0f}" for each in score)])
        pen.rectangle(pen.textbbox(first, words, font=font), fill=colour)
        pen.text(first, words, fill=_BLACK, font=font)
    return picture
