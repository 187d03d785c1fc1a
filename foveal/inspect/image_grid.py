"""A sheet of images in named columns, under a title, with a legend and notes below. B images, C channels."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_IMAGE_SIDE = 128  # pixels; smaller images are enlarged by an integer factor, without smoothing
MAX_SHEET_SIDE = 1600  # pixels of all images together; wider images are reduced, further rows left out
GAP = 4  # pixels between images
MARGIN = 8  # pixels around everything
_FONT_SIZE, _LINE_HEIGHT = 12, 15  # pixels
_SWATCH = 11  # pixels: side of the colour square before a name of the legend
_PAPER, _INK = (255, 255, 255), (30, 30, 30)

Color = tuple[int, ...]


def draw_image_grid(
    columns: Mapping[str, Tensor],
    *,
    title: str = "",
    legend: Sequence[tuple[str, Color]] = (),
    notes: Sequence[str] = (),
    min_side: int = MIN_IMAGE_SIDE,
) -> Image.Image:
    """Return columns of images uint8 [B, 1 or 3, H, W], by name, side by side: one row per image.

    ``legend``: names with their colours. ``notes``: sentences. Images smaller than ``min_side`` are enlarged.
    """
    tensors = list(columns.values())
    num_images, _, height, width = tensors[0].shape
    width, height = _tile_size(width, height, len(columns), min_side)
    num_rows = max(1, min(num_images, (MAX_SHEET_SIDE + GAP) // (height + GAP)))
    text_width = max(2 * MIN_IMAGE_SIDE, len(columns) * (width + GAP) - GAP)
    head, names = wrap_text(title, text_width), [wrap_text(name, width - GAP) for name in columns]
    legend_entries, num_legend_lines = _layout_legend(legend, text_width)
    foot = [line for note in notes for line in wrap_text(note, text_width)]
    images_top = MARGIN + (len(head) + max(map(len, names))) * _LINE_HEIGHT + GAP
    legend_top = images_top + num_rows * (height + GAP)
    foot_top = legend_top + num_legend_lines * _LINE_HEIGHT
    sheet = Image.new("RGB", (text_width + 2 * MARGIN, foot_top + len(foot) * _LINE_HEIGHT + MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write_lines(pen, head, MARGIN, MARGIN)
    for number, (lines, tensor) in enumerate(zip(names, tensors, strict=True)):
        left = MARGIN + number * (width + GAP)
        _write_lines(pen, lines, left, images_top - GAP - len(lines) * _LINE_HEIGHT)
        for row, image in enumerate(tensor[:num_rows]):
            sheet.paste(_to_tile(image, width, height), (left, images_top + row * (height + GAP)))
    for (name, x, line), (_, color) in zip(legend_entries, legend, strict=True):
        left, top = MARGIN + x, legend_top + line * _LINE_HEIGHT
        pen.rectangle((left, top + 1, left + _SWATCH, top + 1 + _SWATCH), fill=color)
        _write_lines(pen, [name], left + _SWATCH + 4, top)
    _write_lines(pen, foot, MARGIN, foot_top)
    return sheet


def wrap_text(text: str, width: int) -> list[str]:
    """Return the lines of a text, in ASCII, that fit into ``width`` pixels; a longer word has a line of its own."""
    font, lines = _font(), [""]
    for word in text.encode("ascii", "replace").decode().split():  # every default font has ASCII
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if lines[0] else []


def _tile_size(width: int, height: int, num_columns: int, min_side: int) -> tuple[int, int]:
    """Return width and height of an image on the sheet: enlarged by an integer factor, or reduced to fit."""
    max_width = (MAX_SHEET_SIDE + GAP) // num_columns - GAP
    scale = min(math.ceil(min_side / max(width, height)), max_width // width, MAX_SHEET_SIDE // height)
    if scale >= 1:
        return width * scale, height * scale
    reduction = min(1.0, max_width / width, MAX_SHEET_SIDE / height)
    return max(1, round(width * reduction)), max(1, round(height * reduction))


def _to_tile(image: Tensor, width: int, height: int) -> Image.Image:
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    is_smaller = width < picture.width
    return picture.resize((width, height), Image.Resampling.LANCZOS if is_smaller else Image.Resampling.NEAREST)


def _layout_legend(legend: Sequence[tuple[str, Color]], width: int) -> tuple[list[tuple[str, int, int]], int]:
    """Return (name in ASCII, x in pixels, line) per entry, and the number of lines."""
    entries: list[tuple[str, int, int]] = []
    x, line = 0, 0
    for name, _ in legend:
        ascii_name = " ".join(name.encode("ascii", "replace").decode().split())  # a line break would need a line
        entry_width = _SWATCH + 4 + int(_font().getlength(ascii_name)) + 12
        if x and x + entry_width > width:
            x, line = 0, line + 1
        entries.append((ascii_name, x, line))
        x += entry_width
    return entries, line + 1 if legend else 0


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _write_lines(pen: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * _LINE_HEIGHT), line, fill=_INK, font=_font())
