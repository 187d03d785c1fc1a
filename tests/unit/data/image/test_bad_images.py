"""Unusual and damaged images: their pixels or the reason of the refusal, the same with and without simplejpeg."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, full_image, photo
from PIL import Image, features

from foveal.data.image import decode as module
from foveal.data.image.decode import UndecodableError, decode_crop, decode_image

PHOTO = photo(180, 120)
FILES = {
    "JPEG": encoded(PHOTO, quality=90),
    "progressive": encoded(PHOTO, quality=70, progressive=True),
    "restarts": encoded(PHOTO, quality=80, restart_marker_blocks=2),
    "grey": encoded(PHOTO.convert("L")),
    "PNG": encoded(PHOTO, "PNG"),
    "WEBP": encoded(PHOTO, "WEBP"),
    "GIF": encoded(PHOTO, "GIF"),
    "TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
}
JPEGS = ("JPEG", "progressive", "restarts", "grey")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Pillow's warnings of damaged files; a warning is no reason to refuse a file


def outcomes(data: bytes, channels: int = 3, scaling: bool = False) -> list[np.ndarray | str]:
    """Return pixels or reason with simplejpeg and without it, and the reason, if any, of ``decode_image``."""
    results: list[np.ndarray | str] = []
    output_hw = (20, 20) if scaling else (100, 100)
    for decoder in {id(decoder): decoder for decoder in (module.simplejpeg, None)}.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "simplejpeg", decoder)
            try:
                results.append(decode_crop(data, channels, full_image, output_hw, "bilinear", scaling))
            except UndecodableError as error:
                results.append(str(error))
    try:
        decode_image(data, channels)
    except UndecodableError as error:
        return [*results, str(error)]
    return results


def refused(data: bytes) -> str:
    reasons = outcomes(data)
    assert all(isinstance(reason, str) for reason in reasons)
    assert len(set(map(str, reasons))) == 1
    return str(reasons[0])


def accepted(data: bytes, channels: int = 3) -> np.ndarray:
    """Return the pixels [C, 100, 100] of bytes that all decoders accept with the same result."""
    results = outcomes(data, channels)
    assert all(isinstance(pixels, np.ndarray) and np.array_equal(pixels, results[0]) for pixels in results), results
    return np.asarray(results[0])


def near(pixels: np.ndarray, image: Image.Image, max_mean_difference: float) -> bool:
    """Return whether pixels [3, 100, 100] are those of an image, on average."""
    expected = np.asarray(image.convert("RGB").resize((100, 100), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return bool(np.abs(pixels.astype(int) - expected).mean() <= max_mean_difference)


def png(header: bytes, rows: bytes) -> bytes:
    """Return a PNG of a 13-byte header and uncompressed rows."""
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^zero bytes$"),
        (b"to be replaced by the real picture.jpg\n", "^no image in one of the formats JPEG, PNG"),
        (b"<html><body>404 Not Found</body></html>", "^no image in one of the formats"),
        (b"\0" * 5000, "^no image in one of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "^no image"),  # Pillow would start Ghostscript
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "."),
        (FILES["JPEG"][:2], "^no image"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "^pixels of mode F are not supported"),
        (encoded(Image.new("I", (9, 9)), "TIFF"), "^pixels of mode I are not supported"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason) as caught:
        decode_image(data, 3)
    assert refused(data) == str(caught.value)
    assert "0x" not in str(caught.value)  # an address would differ from run to run


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_never_padded_with_grey(name: str) -> None:
    """Cut at 60 positions, header included; the last few bytes of a file may hold no pixels."""
    data = FILES[name]
    for cut in np.linspace(1, len(data) - 30, 60).astype(int):
        assert refused(data[:cut])
    for cut in range(len(data) - 30, len(data)):
        results = outcomes(data[:cut])
        assert len({str(result) for result in results}) == 1
        if isinstance(results[0], np.ndarray):
            assert np.array_equal(results[0], accepted(data))


@settings(max_examples=150)
@given(
    name=st.sampled_from(JPEGS),
    scaling=st.booleans(),
    channels=st.sampled_from([1, 3]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=40), st.integers(0, 60)), max_size=3
    ),
    ending=st.sampled_from([b"", b"\xff\xd9", b"trailing bytes"]),
    fraction=st.floats(0.05, 1),
)
def test_both_decoders_accept_the_same_broken_jpegs(
    name: str,
    scaling: bool,
    channels: int,
    edits: list[tuple[float, bytes, int]],
    ending: bytes,
    fraction: float,
) -> None:
    """The pixels are the same too: bytes overwritten, inserted and removed anywhere, cut with a forged end."""
    data = FILES[name]
    for position, inserted, num_removed in edits:
        start = int(position * len(data))
        data = data[:start] + inserted + data[start + num_removed :]
    results = outcomes(data[: int(fraction * len(data))] + ending, channels, scaling)
    assert all(np.array_equal(result, results[0]) for result in results)
    assert len({isinstance(result, str) for result in results}) == 1


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "PPM"])
def test_a_bomb_is_refused_before_it_is_decoded(name: str) -> None:
    """30,000 x 30,000 pixels (JPEG: 65,500 x 65,500) in a few bytes."""
    start = FILES["JPEG"].index(b"\xff\xc0") + 5
    size = struct.pack(">HH", 65500, 65500)
    bombs = {
        "PNG": png(struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), b"\0" * 90_001),
        "JPEG": FILES["JPEG"][:start] + size + FILES["JPEG"][start + 4 :],
        "GIF": FILES["GIF"][:6] + struct.pack("<HH", 30_000, 30_000) + FILES["GIF"][10:],
        "BMP": (small := encoded(PHOTO, "BMP"))[:18] + struct.pack("<ii", 30_000, 30_000) + small[26:],
        "PPM": b"P6 30000 30000 255\n" + b"\0" * 100,
    }
    began = time.monotonic()
    tracemalloc.start()
    try:
        assert "pixels" in refused(bombs[name])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 20


def test_the_limit_is_pillows_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow itself only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 180 * 120)
    accepted(FILES["PNG"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 180 * 120 - 1)
    assert refused(FILES["PNG"]) == "180x120 pixels are more than Pillow's limit"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_eight_bits_becomes_grey_or_rgb(mode: str) -> None:
    image = PHOTO.convert(mode)
    data = encoded(image, "PNG")
    assert near(accepted(data), image, 0.5 if mode in ("L", "LA", "RGB", "RGBA") else 6)
    assert accepted(data, 1).shape == (1, 100, 100)
    assert decode_image(data, 1).mode == "L"
    assert np.array_equal(np.asarray(decode_image(data, 3)), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped() -> None:
    """The hidden colour is used: no background is invented."""
    clear = PHOTO.copy()
    clear.putalpha(0)
    palette = PHOTO.convert("P")
    for data in (encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True, exact=True)):
        assert near(accepted(data), PHOTO, 0.5)
    assert near(accepted(encoded(palette, "PNG", transparency=bytes(range(256)))), palette, 0.5)


def test_cmyk_keeps_its_colours() -> None:
    """Inverted, as Adobe stores CMYK JPEGs."""
    assert near(accepted(encoded(PHOTO.convert("CMYK"), quality=95)), PHOTO, 5)


def test_of_sixteen_bits_the_upper_eight_stay() -> None:
    grey = np.linspace(0, 65535, 100 * 100).astype(np.uint16).reshape(100, 100)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(accepted(encoded(Image.fromarray(grey), kind), 1)[0], grey >> 8)
    colour = np.stack([grey, grey.T, grey[::-1]], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    data = png(struct.pack(">IIBBBBB", 100, 100, 16, 2, 0, 0, 0), rows)
    assert np.array_equal(accepted(data), colour.transpose(2, 0, 1) >> 8)


def lossless_jpeg(grey: np.ndarray) -> bytes:
    """Return a lossless grey JPEG: each pixel's difference from its left neighbour, with one Huffman table."""
    above = np.concatenate([[128], grey[:-1, 0]]).astype(int)
    bits = ""
    for difference in np.diff(grey.astype(int), axis=1, prepend=above[:, None]).ravel().tolist():
        length = abs(difference).bit_length()
        value = difference if difference > 0 else difference + (1 << length) - 1
        bits += f"{length:04b}" + (f"{value:0{length}b}" if length else "")
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 11, 8, *grey.shape, 1) + b"\1\x11\0"
    table = b"\xff\xc4" + struct.pack(">HB", 28, 0) + bytes([0, 0, 0, 9, *[0] * 12, *range(9)])
    return b"\xff\xd8" + frame + table + b"\xff\xda\0\x08\1\1\0\1\0\0" + scan + b"\xff\xd9"


def test_a_lossless_jpeg_is_never_decoded_scaled() -> None:
    """TurboJPEG crashes the process in that case."""
    grey = np.asarray(PHOTO.convert("L").resize((100, 100)))
    assert np.array_equal(accepted(lossless_jpeg(grey), 1)[0], grey)
    small = outcomes(lossless_jpeg(grey), 1, scaling=True)
    assert np.array_equal(
        small[0], decode_crop(encoded(Image.fromarray(grey), "PNG"), 1, full_image, (20, 20), "bilinear", True)
    )
    assert np.array_equal(small[0], small[-1])


@pytest.mark.skipif(module.simplejpeg is None, reason="simplejpeg is not installed")
def test_pillow_decodes_where_simplejpeg_sees_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = accepted(FILES["JPEG"])
    wrong_size = SimpleNamespace(decode_jpeg=lambda *_, **__: np.zeros((9, 9, 4), np.uint8))
    monkeypatch.setattr(module, "simplejpeg", wrong_size)
    assert np.array_equal(decode_crop(FILES["JPEG"], 3, full_image, (100, 100), "bilinear", False), expected)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue", "green")]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=100)
    assert getattr(Image.open(io.BytesIO(stream.getvalue())), "n_frames", 1) == 3
    assert np.abs(accepted(stream.getvalue()).astype(int) - np.array([255, 0, 0])[:, None, None]).max() <= 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:2] + b"\xff\xe1\x00\x20Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 14 + data[2:],
        lambda data: data + b"what a download tool left behind",
        lambda data: data[:20] + data[2:],
    ],
    ids=["broken EXIF", "bytes after the end", "two JFIF headers"],
)
def test_damage_beside_the_pixels_does_no_harm(damage: Callable[[bytes], bytes]) -> None:
    assert np.array_equal(accepted(damage(FILES["JPEG"])), accepted(FILES["JPEG"]))


def test_one_wrong_bit_in_a_png_is_refused() -> None:
    """PNG has checksums. JPEG has none: a wrong bit is a wrong pixel, which only the manifest's sha256 shows."""
    for place in np.linspace(20, len(FILES["PNG"]) - 20, 20).astype(int):
        data = bytearray(FILES["PNG"])
        data[place] ^= 1
        assert refused(bytes(data))


@pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
def test_a_name_does_not_decide_what_a_file_is() -> None:
    """WebP bytes in a member with the name .jpg decode: only the bytes count."""
    assert near(accepted(FILES["WEBP"]), PHOTO, 8)


def test_running_out_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode_image(FILES["PNG"], 3)
