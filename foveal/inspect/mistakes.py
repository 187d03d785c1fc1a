"""A sheet of images with captions below them, on transparent paper. B images, C channels."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveal.inspect.chart import INK, font_file

_COLUMNS = 6
_SIDE = 150  # pixels of an image's longer side; small images are enlarged by an integer factor, without smoothing
_GAP, _MARGIN = 14, 8  # pixels
_FONT_SIZE, _LINE_HEIGHT = 13, 17  # pixels


def draw_captioned_images(images: Tensor, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Return images uint8 [B, 1 or 3, H, W] in rows of six, each with its lines of text, the first one in bold."""
    columns, num_lines = min(_COLUMNS, len(captions)), max(map(len, captions))
    tiles = [_to_tile(image) for image in images.detach().cpu()]
    tile_height = max(tile.height for tile in tiles)
    cell_width, cell_height = _SIDE + _GAP, tile_height + num_lines * _LINE_HEIGHT + _GAP
    rows = math.ceil(len(tiles) / columns)
    size = columns * cell_width - _GAP + 2 * _MARGIN, rows * cell_height - _GAP + 2 * _MARGIN
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        left, top = _MARGIN + number % columns * cell_width, _MARGIN + number // columns * cell_height
        sheet.paste(tile, (left, top))
        for line_number, line in enumerate(lines):
            font = ImageFont.truetype(font_file(bold=line_number == 0), _FONT_SIZE)
            text = truncate_text(line, font, cell_width - 4)
            pen.text((left, top + tile_height + 3 + line_number * _LINE_HEIGHT), text, fill=INK, font=font)
    return sheet


def truncate_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text of one line that fits into ``width`` pixels, its end left out if it must be."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _to_tile(image: Tensor) -> Image.Image:
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    longer = max(picture.size)
    if longer > _SIDE:
        width, height = (max(1, round(side * _SIDE / longer)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    scale = _SIDE // longer
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
