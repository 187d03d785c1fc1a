"""A grid of images in rows and columns."""

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

GAP = 2  # pixels between images
WHITE = 255
MIN_IMAGE_SIDE = 64  # pixels; smaller images are enlarged by an integer factor, without smoothing


def make_image_grid(columns: Sequence[Tensor], bottom_margin: int = 0) -> Image.Image:
    """Return columns of images uint8 [B, 1 or 3, H, W] side by side, one row per image.

    ``bottom_margin``: height in pixels of a white area below them.
    """
    batch, _, height, width = columns[0].shape
    scale = max(1, math.ceil(MIN_IMAGE_SIDE / max(height, width)))
    height, width = height * scale, width * scale
    size = (len(columns) * (width + GAP) - GAP, batch * (height + GAP) - GAP + bottom_margin)
    grid = Image.new("RGB", size, (WHITE, WHITE, WHITE))
    for column_index, column in enumerate(columns):
        for row_index, image in enumerate(column):
            picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (column_index * (width + GAP), row_index * (height + GAP)))
    return grid
