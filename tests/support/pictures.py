"""Pictures for the tests of decoding, and their files."""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from foveal.data.image.transforms import CropBox


def photo(width: int, height: int) -> Image.Image:
    """Blotches, edges and grain in RGB: about as many bytes a pixel as a photograph has."""
    random = np.random.default_rng(0)
    total = np.full((height, width, 3), 128, dtype=np.float32)
    for step in (60, 12, 3):
        coarse = random.normal(0, 40, (3, max(2, height // step), max(2, width // step))).astype(np.float32)
        total += np.stack([np.asarray(Image.fromarray(plane).resize((width, height))) for plane in coarse], axis=-1)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def full_image(width: int, height: int) -> tuple[CropBox, bool]:
    """The whole of an image as its crop."""
    return (0, 0, width, height), False


def tiff(bits: int, values: np.ndarray, *, white_is_zero: bool = False) -> bytes:
    """An uncompressed grey TIFF whose rows are whole bytes."""
    if bits == 12:
        text = "".join(f"{value:012b}" for value in values.ravel())
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        data = values.astype({8: "u1", 16: "<u2"}[bits]).tobytes()
    return tiff_file(values.shape, (bits,), data, {262: (0 if white_is_zero else 1,)})


def tiff_file(shape: tuple[int, ...], bits: tuple[int, ...], data: bytes, more: dict[int, tuple[int, ...]]) -> bytes:
    """An uncompressed TIFF of one strip: (height, width), bits of each channel, tags by number (TIFF 6.0)."""
    height, width = shape
    tags = {256: (width,), 257: (height,), 258: bits, 259: (1,), 273: (0,), 277: (len(bits),), 278: (height,)}
    tags |= {279: (len(data),)} | more
    place = 8 + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    tags[273] = (place + sum(2 * len(numbers) for numbers in tags.values() if len(numbers) > 1),)
    for tag, numbers in sorted(tags.items()):
        if len(numbers) > 1:
            entries += struct.pack("<HHII", tag, 3, len(numbers), place + len(values))
            values += struct.pack(f"<{len(numbers)}H", *numbers)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, *numbers)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return header + entries + struct.pack("<I", 0) + values + data


def id_png(array: np.ndarray) -> bytes:
    """A grey PNG of 8 bits whose pixels are ids."""
    return encoded(Image.fromarray(array.astype(np.uint8)), "PNG")


def mask_png(*ids: int, side: int = 16) -> bytes:
    """A square mask that repeats these ids."""
    return id_png(np.resize(ids, (side, side)))
