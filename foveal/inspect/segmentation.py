"""A sheet of segmentations: for every image a row of the image, its mask over it, and the guess over it.

B images, C channels, H x W pixels, K classes.
"""

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveal.inspect.image_grid import GAP, MIN_IMAGE_SIDE, make_image_grid

GREY = 128  # a pixel of no class
_COVER = 0.6  # of a pixel is the colour of its class, the rest is its brightness
_TURN = 0.618034  # of the circle of hues, from one class to the next: so few in a row lie far apart
_IN_A_SHADE = 5
_SHADES = ((1.0, 1.0), (0.45, 1.0), (1.0, 0.55))  # saturation and value: classes of like hues are of other shades
_LINE, _BLOCK = 14, 10  # pixels of a line of names, of a block of colour before a name
_MOST = 40  # classes that are named under the sheet


def make_class_palette(num_classes: int) -> Tensor:
    """A colour for each class, uint8 [K, 3], the same for a class whatever their number."""
    shades = [_SHADES[number // _IN_A_SHADE % len(_SHADES)] for number in range(num_classes)]
    found = [colorsys.hsv_to_rgb(number * _TURN % 1, *shade) for number, shade in enumerate(shades)]
    return (torch.tensor(found) * 255).round().to(torch.uint8)


def draw_segmentation_grid(
    images: Tensor, ground_truth: Tensor, predicted: Tensor, class_names: Sequence[str]
) -> Image.Image:
    """One row per image: itself, its mask, the guess; under them which colour is which class.

    ``images`` uint8 [B, C, H, W]; ``truth`` and ``guess`` integers [B, H, W], below 0 for a pixel of no class, which is
    grey; ``names`` are the K classes'.
    """
    images, ground_truth, predicted = (each.detach().cpu() for each in (images, ground_truth, predicted))
    palette = make_class_palette(len(class_names))
    columns = [
        images,
        _blend_mask(images, ground_truth.long(), palette),
        _blend_mask(images, predicted.long(), palette),
    ]
    across = 3 * max(MIN_IMAGE_SIDE, images.shape[3])
    places, lines = _layout_legend(class_names[:_MOST], across)
    page = make_image_grid(columns, bottom_margin=GAP + lines * _LINE)
    draw, top = ImageDraw.Draw(page), page.height - lines * _LINE
    for (name, left, line), colour in zip(places, palette.tolist(), strict=False):
        draw.rectangle(
            (left, top + line * _LINE + 2, left + _BLOCK, top + line * _LINE + 2 + _BLOCK), fill=tuple(colour)
        )
        draw.text((left + _BLOCK + 3, top + line * _LINE), name, fill=(0, 0, 0))
    return page


def _blend_mask(images: Tensor, ids: Tensor, palette: Tensor) -> Tensor:
    """Images uint8 [B, 3, H, W] of the classes' colours, with the brightness of the pixels under them."""
    colour_BCHW = torch.where((ids < 0)[..., None], torch.tensor(GREY), palette[ids.clamp(min=0)]).permute(0, 3, 1, 2)
    bright_B1HW = images.float().mean(dim=1, keepdim=True)
    return (_COVER * colour_BCHW + (1 - _COVER) * bright_B1HW).round().to(torch.uint8)


def _layout_legend(names: Sequence[str], across: int) -> tuple[list[tuple[str, int, int]], int]:
    """Each name as it can be written, with the pixel where it begins and its line, and the number of lines."""
    font, places, left, line = ImageFont.load_default(), [], 0, 0
    for name in names:
        plain = name.encode("ascii", "replace").decode()  # what every default font has
        length = _BLOCK + 3 + int(font.getlength(plain)) + 10
        if left and left + length > across:
            left, line = 0, line + 1
        places.append((plain, left, line))
        left += length
    return places, line + 1 if names else 0
