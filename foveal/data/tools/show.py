"""A data set to look at: how many samples of every class, and a sheet of images with their labels."""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError, decode_image
from foveal.errors import DataError
from foveal.seeding import derive_key, draw_permutation

_BAR = 40  # characters of the longest bar
_LISTED = 100  # classes; of more, the largest and the smallest are shown
_ENDS = 10  # of these, each
_NAME = 30  # characters of a class name
_COLUMNS, _ROWS = 8, 6  # images on a sheet
_SHARDS = 12  # at most so many are opened for a sheet: each may lie behind a URL
_SIDE, _CAPTION, _GAP = 128, 18, 6  # pixels of an image, of the line under it, between images
_SMALL = 10  # points of the captions
_PAPER, _INK, _MISSING = (255, 255, 255), (40, 40, 40), (200, 60, 60)


def format_class_histogram(class_counts: dict[str, np.ndarray], class_names: tuple[str, ...]) -> Iterator[str]:
    """Lines of a table: samples of every class in every split, and a bar of those in the first split.

    Of more than 100 classes, the ten with most and the ten with fewest samples in the first split are listed.
    """
    first = next(iter(class_counts.values()))
    rows = list(range(len(class_names)))
    gap = None
    if len(class_names) > _LISTED:
        order = np.argsort(-first, kind="stable").tolist()
        rows, gap = order[:_ENDS] + order[-_ENDS:], _ENDS
    width = max(len(class_names[row][:_NAME]) for row in [*rows]) if rows else 0
    width = max(width, len("class"))
    yield f"{'class':{width}}" + "".join(f"{split:>12}" for split in class_counts)
    for place, row in enumerate(rows):
        if place == gap:
            yield f"... {len(class_names) - len(rows):,} classes between ..."
        bar = "#" * round(_BAR * int(first[row]) / max(1, int(first.max())))
        numbers = "".join(f"{count[row]:>12,}" for count in class_counts.values())
        yield f"{class_names[row][:_NAME]:{width}}{numbers}  {bar}".rstrip()


def draw_contact_sheet(dataset: Dataset, split: str) -> Image.Image:
    """Up to 48 images of a split, the same each time, spread over its shards, with label or key underneath.

    An image that does not decode is a red square with the reason. Raises: DataError if a shard or index is unreadable.
    """
    chosen = _select_images(dataset, split)
    rows = -(-len(chosen) // _COLUMNS)
    columns = min(len(chosen), _COLUMNS)
    across, down = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_SMALL)
    for number, (shard, row) in enumerate(chosen):
        left, top = _GAP + number % _COLUMNS * across, _GAP + number // _COLUMNS * down
        index = dataset.shard_index(split, shard)
        offset, size = index.find_image(row)
        picture, caption = (
            _thumbnail(dataset.shard_folder.read_range(index.shard, offset, offset + size)),
            index.key(row).rsplit("/", 1)[-1],
        )
        label = int(index.labels[row])
        if label >= 0 and dataset.classes is not None:
            caption = dataset.classes[label]
        inset = ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2)
        sheet.paste(picture, (left + inset[0], top + inset[1]))
        draw.text((left, top + _SIDE + 2), _truncate_text(caption, font), fill=_INK, font=font)
    return sheet


def _select_images(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    """(shard, row) of the images on the sheet: of shards spread over the split, hashed places, in their order."""
    counts = dataset.samples_per_shard(split)
    shards = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), _SHARDS)).round().astype(int))
    samples = [(int(shard), row) for shard in shards for row in _select_rows(int(shard), int(counts[shard]))]
    places = np.linspace(0, len(samples) - 1, min(len(samples), _COLUMNS * _ROWS)).round().astype(int)
    return [samples[place] for place in np.unique(places)]


def _select_rows(shard: int, count: int) -> list[int]:
    """As many rows of a shard as a sheet can hold, in their order."""
    return sorted(draw_permutation(derive_key(0, "sheet", shard), count)[: _COLUMNS * _ROWS].tolist())


def _thumbnail(data: bytes) -> Image.Image:
    """An image no larger than its place on the sheet; a small one is enlarged by a whole factor, pixels as squares."""
    try:
        picture = decode_image(data, 3)
    except UndecodableError as error:
        square = Image.new("RGB", (_SIDE, _SIDE), _MISSING)
        font = ImageFont.load_default(_SMALL)
        words = "\n".join(_truncate_text(line, font) for line in _wrap_text(f"does not decode: {error}"))
        ImageDraw.Draw(square).multiline_text((4, 4), words, fill=_PAPER, font=font)
        return square
    factor = _SIDE // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _wrap_text(text: str) -> list[str]:
    return [text[start : start + 22] for start in range(0, min(len(text), 176), 22)]


def _truncate_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits under an image."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    while font.getlength(text) > _SIDE:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def save_contact_sheet(dataset: Dataset, split: str, file: str) -> None:
    """Write the contact sheet of a split. Raises: as ``contact_sheet``, and DataError if the file cannot be written."""
    sheet = draw_contact_sheet(dataset, split)
    try:
        sheet.save(file, "PNG")
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error})") from None
