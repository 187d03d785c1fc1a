"""`foveal data show`: a histogram of the classes, and a contact sheet of images with their labels."""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import ShardIndex
from foveal.data.image.decode import UndecodableError, decode_image
from foveal.data.image.targets import AppliedCrop, LabelReader
from foveal.errors import DataError
from foveal.seeding import derive_key, draw_permutation

_BAR = 40  # characters of the longest bar
_MAX_LISTED = 100  # classes; if there are more, only the largest and the smallest are listed
_NUM_EXTREMES = 10  # largest and smallest classes listed in that case, each
_NAME = 30  # characters of a class name
_COLUMNS, _ROWS = 8, 6  # images on a sheet
_MAX_SHARDS = 12  # opened for one sheet: each may be remote
_SIDE, _CAPTION, _GAP = 128, 18, 6  # pixels of an image, of its caption, between images
_FONT_SIZE = 10  # points of the captions
_PAPER, _INK, _MISSING = (255, 255, 255), (40, 40, 40), (200, 60, 60)


def format_class_histogram(class_counts: dict[str, np.ndarray], class_names: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table: samples per class and split, with a bar for the first split.

    Of more than 100 classes, only the ten largest and the ten smallest in the first split are listed. Without samples
    of any class, whose labels may be in masks or lists, one line says so.
    """
    if not any(counts.any() for counts in class_counts.values()):
        yield "no sample has a class of the index; `foveal data verify --full` reads and counts labels in other members"
        return
    first = next(iter(class_counts.values()))
    rows = list(range(len(class_names)))
    gap = None
    if len(class_names) > _MAX_LISTED:
        order = np.argsort(-first, kind="stable").tolist()
        rows, gap = order[:_NUM_EXTREMES] + order[-_NUM_EXTREMES:], _NUM_EXTREMES
    width = max([len("class"), *(len(class_names[row][:_NAME]) for row in rows)])
    yield f"{'class':{width}}" + "".join(f"{split:>12}" for split in class_counts)
    for position, row in enumerate(rows):
        if position == gap:
            yield f"... {len(class_names) - len(rows):,} classes between ..."
        bar = "#" * round(_BAR * int(first[row]) / max(1, int(first.max())))
        numbers = "".join(f"{count[row]:>12,}" for count in class_counts.values())
        yield f"{class_names[row][:_NAME]:{width}}{numbers}  {bar}".rstrip()


def draw_contact_sheet(dataset: Dataset, split: str, label_reader: LabelReader | None = None) -> Image.Image:
    """Draw up to 48 images spread over a split's shards, always the same ones, each with a caption.

    The caption is the label that ``label_reader`` reads, or without a reader the class name, or the key. An image that
    does not decode is a red square with the reason. Raises: DataError if a shard or index is unreadable.
    """
    selection = _select_images(dataset, split)
    num_rows = -(-len(selection) // _COLUMNS)
    num_columns = min(len(selection), _COLUMNS)
    cell_width, cell_height = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    sheet = Image.new("RGB", (num_columns * cell_width + _GAP, num_rows * cell_height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, (shard, row) in enumerate(selection):
        left, top = _GAP + number % _COLUMNS * cell_width, _GAP + number // _COLUMNS * cell_height
        index = dataset.shard_index(split, shard)
        thumbnail, caption = _draw_sample(dataset, index, row, label_reader)
        inset = ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2)
        sheet.paste(thumbnail, (left + inset[0], top + inset[1]))
        draw.text((left, top + _SIDE + 2), _truncate_text(caption, font), fill=_INK, font=font)
    return sheet


def _draw_sample(
    dataset: Dataset, index: ShardIndex, row: int, label_reader: LabelReader | None
) -> tuple[Image.Image, str]:
    """Return the thumbnail and the caption of a sample."""
    key = index.key(row).rsplit("/", 1)[-1]
    try:
        label_field = None if label_reader is None else label_reader.field
        data = _read_member(dataset, index, index.find_image_offset_size(row, label_field))
        image = decode_image(data, 3, bit_depth=dataset.manifest.bit_depth)
    except UndecodableError as error:
        return _make_error_square(str(error)), key
    if label_reader is not None:
        image, caption = _draw_label(dataset, index, row, label_reader, image)
        return _make_thumbnail(image), caption
    label = int(index.labels[row])
    return _make_thumbnail(image), dataset.classes[label] if label >= 0 and dataset.classes is not None else key


def _draw_label(
    dataset: Dataset, index: ShardIndex, row: int, label_reader: LabelReader, image: Image.Image
) -> tuple[Image.Image, str]:
    """Return the image with its label, and the label in words or what is wrong with it."""
    member = index.find_member_offset_size(row, label_reader.field)
    if member is None:
        return image, f"no member .{label_reader.field}"
    try:
        data = _read_member(dataset, index, member)
        label = label_reader.read_label(data, AppliedCrop.whole_image(*image.size), index.key(row))
    except (UndecodableError, DataError) as error:
        return image, f"! {error}"
    return label_reader.draw_label(image, label), label_reader.describe_label(label)


def _read_member(dataset: Dataset, index: ShardIndex, offset_and_size: tuple[int, int]) -> bytes:
    offset, size = offset_and_size
    return dataset.shard_folder.read_up_to(index.shard, offset, offset + size)


def _select_images(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    """Return (shard, row) of the sheet's images, ascending: hashed rows of shards spread over the split."""
    counts = dataset.samples_per_shard(split)
    shards = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), _MAX_SHARDS)).round().astype(int))
    samples = [(int(shard), row) for shard in shards for row in _select_rows(int(shard), int(counts[shard]))]
    positions = np.linspace(0, len(samples) - 1, min(len(samples), _COLUMNS * _ROWS)).round().astype(int)
    return [samples[position] for position in np.unique(positions)]


def _select_rows(shard: int, count: int) -> list[int]:
    """Return hashed rows of a shard, ascending, at most as many as fit on a sheet."""
    return sorted(draw_permutation(derive_key(0, "sheet", shard), count)[: _COLUMNS * _ROWS].tolist())


def _make_error_square(error: str) -> Image.Image:
    square = Image.new("RGB", (_SIDE, _SIDE), _MISSING)
    font = ImageFont.load_default(_FONT_SIZE)
    reason = "\n".join(_truncate_text(line, font) for line in _wrap_text(f"does not decode: {error}"))
    ImageDraw.Draw(square).multiline_text((4, 4), reason, fill=_PAPER, font=font)
    return square


def _make_thumbnail(image: Image.Image) -> Image.Image:
    """Shrink an image to its cell; enlarge a small image by an integer factor, nearest neighbour."""
    factor = _SIDE // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    return image


def _wrap_text(text: str) -> list[str]:
    return [text[start : start + 22] for start in range(0, min(len(text), 176), 22)]


def _truncate_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Truncate a text to the width of an image and replace unprintable characters."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    while font.getlength(text) > _SIDE:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def save_contact_sheet(dataset: Dataset, split: str, file: str, label_reader: LabelReader | None = None) -> None:
    """Write the contact sheet of a split as PNG. Raises: as ``draw_contact_sheet``; DataError if writing fails."""
    sheet = draw_contact_sheet(dataset, split, label_reader)
    try:
        sheet.save(file, "PNG")
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error})") from None
