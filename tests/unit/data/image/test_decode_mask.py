"""Class ids of masks: as they were stored, whatever Pillow makes of them, and upright as their image."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, tiff
from PIL import Image

from foveal.data.image.decode import UndecodableError, decode_image
from foveal.data.image.decode_mask import decode_mask_crop

IDS = np.array([[0, 1, 2, 3], [3, 1, 0, 2]])


def ids_of(data: bytes, version: int = 2) -> np.ndarray:
    """Return the ids of the whole mask."""
    width, height = Image.open(io.BytesIO(data)).size
    if version == 2:
        height, width = np.asarray(decode_image(data, 1, bit_depth=16)).shape
    size, ids = decode_mask_crop(data, (0, 0, width, height), False, (height, width), version)
    assert size == (width, height)
    return ids


def grey_png(bits: int, rows: list[int], width: int) -> bytes:
    """Encode a grey PNG of less than 8 bits, one byte a row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(bytes([0, row]) for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


COLORS = [[255, 0, 0], [0, 255, 0], [9, 9, 9], [7, 7, 7]]


def palette_png(bits: int, colors: list[list[int]] = COLORS, ids: np.ndarray = IDS) -> bytes:
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette([value for color in colors for value in color])
    return encoded(image, "PNG", bits=bits)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(IDS.astype(np.uint8)), "PNG"), IDS),
        (encoded(Image.fromarray((IDS * 300).astype(np.uint16)), "PNG"), IDS * 300),
        (grey_png(1, [0b01000000], 4), [[0, 1, 0, 0]]),
        (palette_png(2), IDS),
        (palette_png(8), IDS),
        (palette_png(8, [[grey] * 3 for grey in range(4)]), IDS),
        (palette_png(8, [[0] * 3, [255] * 3], IDS % 2), IDS % 2),
        (b"P5 4 2 10\n" + IDS.astype(np.uint8).tobytes(), IDS),
        (b"P5 4 2 255\n" + IDS.astype(np.uint8).tobytes(), IDS),
        (b"P5 4 2 1000\n" + (IDS * 300).astype(">u2").tobytes(), IDS * 300),
        (b"P5 4 2 65535\n" + (IDS * 300).astype(">u2").tobytes(), IDS * 300),
        (b"P2 4 2 7\n0 1 2 3 3 1 0 2\n", IDS),
        (tiff(16, IDS * 300), IDS * 300),
        (tiff(8, IDS), IDS),
    ],
    ids=[
        *["png-8", "png-16", "png-1", "palette-2", "palette-8", "palette-of-its-index", "black-and-white"],
        *["pgm-10", "pgm-255", "pgm-1000", "pgm-65535", "pgm-plain", "tiff-16", "tiff-8"],
    ],
)
def test_the_ids_are_those_that_were_stored(data: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(ids_of(data), expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.fromarray(IDS.astype(np.uint8)), "JPEG", quality=100), "a JPEG does not keep class ids"),
        (encoded(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), "PNG"), "pixels of mode RGB are not class ids"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.uint8)), "WEBP", lossless=True), "mode RGB are not class ids"),
        (grey_png(2, [0b00011011, 0b11010010], 4), "grey of 2 bits may hold the ids or"),
        (grey_png(4, [0x0F, 0x71], 2), "grey of 4 bits"),
        (
            palette_png(8, [[0] * 3, [5] * 3, [9] * 3, [11] * 3]),
            r"its indices \(0, 1, 2, 3\) or its greys \(0, 5, 9, 11\)",
        ),
        (b"P4 8 1\n\xaa", "0 is white does not say which ids are meant"),
        (tiff(8, IDS, white_is_zero=True), "0 is white"),
        (tiff(16, IDS, white_is_zero=True), "0 is white"),
    ],
    ids=["jpeg", "rgb", "webp", "png-2", "png-4", "grey-palette", "pbm", "tiff-8-white-0", "tiff-16-white-0"],
)
def test_formats_that_do_not_keep_ids_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        ids_of(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image_is(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = Image.fromarray((IDS * 60).astype(np.uint8))
    data = encoded(mask, "PNG", exif=exif)
    assert np.array_equal(ids_of(data), np.asarray(decode_image(data, 1)))
    assert np.array_equal(ids_of(data, version=1), IDS * 60), "runs begun before keep their rule"


def test_a_crop_of_a_turned_mask() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.arange(24).reshape(4, 6)
    data = encoded(Image.fromarray(stored.astype(np.uint8)), "PNG", exif=exif)
    size, ids = decode_mask_crop(data, (1, 0, 3, 4), True, (4, 2))
    assert size == (4, 6)
    assert np.array_equal(ids, np.rot90(stored, -1)[0:4, 1:3][:, ::-1])
