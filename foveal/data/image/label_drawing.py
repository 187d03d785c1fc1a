"""Labels drawn on images: masks as colours over the image, boxes as outlines. K classes."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

GREY = 128  # value of a pixel without a class
_OPACITY = 0.6  # of the class's colour over the pixel's brightness
_HUE_STEP = 0.618034  # of the circle of hues, between consecutive classes: keeps a few consecutive hues far apart
_CLASSES_PER_SHADE = 5
_SHADES = ((1.0, 1.0), (0.45, 1.0), (1.0, 0.55))  # (saturation, value): classes of similar hue differ in shade
_LINES_PER_SIDE = 100  # widths of a box's outline along the image's longer side


def make_class_palette(num_classes: int) -> Tensor:
    """Return a colour per class, uint8 [K, 3]; a class's colour does not depend on the number of classes."""
    shades = [_SHADES[number // _CLASSES_PER_SHADE % len(_SHADES)] for number in range(num_classes)]
    colours = [colorsys.hsv_to_rgb(number * _HUE_STEP % 1, *shade) for number, shade in enumerate(shades)]
    return (torch.tensor(colours) * 255).round().to(torch.uint8)


def blend_masks(images: Tensor, ids: Tensor, palette: Tensor) -> Tensor:
    """Return images uint8 [B, 3, H, W] of the classes' colours blended with the images' brightness.

    ``images`` uint8 [B, C, H, W]; ``ids`` int64 [B, H, W], negative for pixels without a class, which become grey.
    """
    colour_BCHW = torch.where((ids < 0)[..., None], torch.tensor(GREY), palette[ids.clamp(min=0)]).permute(0, 3, 1, 2)
    brightness_B1HW = images.float().mean(dim=1, keepdim=True)
    return (_OPACITY * colour_BCHW + (1 - _OPACITY) * brightness_B1HW).round().to(torch.uint8)


def draw_mask(image: Image.Image, mask: np.ndarray, num_classes: int) -> Image.Image:
    """Return an RGB image under its mask, integers [H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    blended = blend_masks(pixels, torch.from_numpy(mask.astype(np.int64))[None], make_class_palette(num_classes))
    return Image.fromarray(blended[0].permute(1, 2, 0).contiguous().numpy())


def draw_box_outlines(image: Image.Image, boxes: np.ndarray, num_classes: int) -> Image.Image:
    """Return an RGB image with the outlines of its boxes [n, 5]: left, top, right, bottom in pixels, and class."""
    drawn, palette = image.copy(), make_class_palette(num_classes).tolist()
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(image.size) / _LINES_PER_SIDE))
    for left, top, right, bottom, label in boxes.tolist():
        corners = (left, top), (max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=tuple(palette[int(label)]), width=width)
    return drawn
