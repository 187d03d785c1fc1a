"""PNG files with texts above Pillow's limit: their pixels decode, and runs of before 0.2 count them as bad still."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from foveal.data.image.decode import UndecodableError, decode_crop, decode_image
from foveal.data.image.decode_mask import decode_mask_crop
from foveal.data.image.png import drop_long_texts

LONG = "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def with_text(keyword: str, kind: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if kind == "zTXt":
        info.add_text(keyword, LONG, zip=True)
    else:
        info.add_itxt(keyword, LONG, zip=True)
    return png(pnginfo=info)


def behind_the_pixels(data: bytes) -> bytes:
    """Move the text's chunk behind the pixels, where Pillow reads it at the end of loading."""
    begin = data.index(b"zTXt") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4])
    return data[:begin] + data[end:-12] + data[begin:end] + data[-12:]


@pytest.mark.parametrize(
    "data",
    [
        with_text("workflow", "zTXt"),
        with_text("workflow", "iTXt"),
        behind_the_pixels(with_text("workflow", "zTXt")),
        png(icc_profile=LONG.encode()),
    ],
)
def test_long_texts_do_not_decide_whether_pixels_decode(data: bytes) -> None:
    assert np.array_equal(np.asarray(decode_image(data, 1)), np.arange(48).reshape(6, 8))
    box = (0, 0, 8, 6)
    crop = decode_crop(data, 1, lambda *_: (box, False), (6, 8), "bilinear", False)
    assert np.array_equal(crop[0], np.arange(48).reshape(6, 8))
    assert np.array_equal(decode_mask_crop(data, box, False, (6, 8))[1], np.arange(48).reshape(6, 8))
    for decode in (lambda: decode_image(data, 1, 1), lambda: decode_mask_crop(data, box, False, (6, 8), 1)):
        with pytest.raises(UndecodableError, match="too large"):
            decode()


def test_a_text_that_may_hold_the_orientation_stays() -> None:
    data = with_text("XML:com.adobe.xmp", "iTXt")
    assert drop_long_texts(data) == data
    with pytest.raises(UndecodableError, match="too large"):
        decode_image(data, 1)


@pytest.mark.parametrize("data", [b"", b"no image", png(), png()[:60], png(icc_profile=b"short")])
def test_every_other_file_stays_as_it_is(data: bytes) -> None:
    assert drop_long_texts(data) == data
