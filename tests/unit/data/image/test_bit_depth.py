"""Images of more than 8 bits per channel: which 8 bits are kept, and which images say too little to decide."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import full_image, tiff, tiff_file
from PIL import Image

from foveal.data.dataset import open_unchecked_dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.image.decode import UndecodableError, decode_crop, decode_image
from foveal.data.indexing.index import index_folder
from foveal.data.pack.folder import pack_folder
from foveal.data.tools.verify import verify_dataset

RAMP_12 = np.arange(4096).reshape(64, 64)
RAMP_16 = np.arange(0, 65536, 16).reshape(64, 64)


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def rgb_tiff_16(values: np.ndarray) -> bytes:
    """Encode a TIFF of three equal channels of 16 bits."""
    return tiff_file(values.shape, (16, 16, 16), np.repeat(values.astype("<u2"), 3).tobytes(), {262: (2,)})


def grey_of(data: bytes, **options: int) -> np.ndarray:
    """Decode to one channel, in both ways of the product, which must agree."""
    whole = np.asarray(decode_image(data, 1, **options))
    crop = decode_crop(data, 1, full_image, whole.shape, "bilinear", True, **options)
    assert np.array_equal(crop[0], whole)
    return whole


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(12, RAMP_12), RAMP_12 >> 4),
        (tiff(16, RAMP_16), RAMP_16 >> 8),
        (tiff(16, RAMP_16, white_is_zero=True), 255 - (RAMP_16 >> 8)),
        (tiff(8, RAMP_16 >> 8, white_is_zero=True), 255 - (RAMP_16 >> 8)),
        (png(RAMP_16), RAMP_16 >> 8),
        (png(np.zeros((8, 8))), np.zeros((8, 8))),
        (b"P5 64 64 4095\n" + RAMP_12.astype(">u2").tobytes(), np.rint(RAMP_12 * (65535 / 4095)).astype(int) >> 8),
        (b"P5 64 64 65535\n" + RAMP_16.astype(">u2").tobytes(), RAMP_16 >> 8),
    ],
    ids=["tiff-12", "tiff-16", "tiff-16-white-0", "tiff-8-white-0", "png-16", "black", "pgm-4095", "pgm-65535"],
)
def test_the_upper_bits_of_those_that_the_file_states(data: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(grey_of(data), expected)


@pytest.mark.parametrize(
    "encode",
    [png, lambda values: tiff(16, values), lambda values: b"P5 64 64 65535\n" + values.astype(">u2").tobytes()],
    ids=["png", "tiff", "pgm"],
)
def test_a_sensors_bits_in_a_container_of_16(encode: Callable[[np.ndarray], bytes]) -> None:
    with pytest.raises(UndecodableError, match=r"stored in 16 bits and use about 12: .* --bit-depth BITS"):
        decode_image(encode(RAMP_12), 1)
    assert np.array_equal(grey_of(encode(RAMP_12), bit_depth=12), RAMP_12 >> 4)
    assert np.array_equal(grey_of(encode(RAMP_12 // 4), bit_depth=10), RAMP_12 >> 4)
    assert np.array_equal(grey_of(encode(RAMP_12), bit_depth=16), RAMP_12 >> 8), "stated: the image is dark"
    with pytest.raises(UndecodableError, match="most of its pixels are above the bit depth of 12"):
        decode_image(encode(RAMP_16), 1, bit_depth=12)


def test_a_few_pixels_without_data_do_not_hide_the_bits() -> None:
    reflectance = RAMP_12 * 10000 // 4095
    with pytest.raises(UndecodableError, match="use about 14"):
        decode_image(png(reflectance), 1)
    reflectance[0, :3] = 65535
    with pytest.raises(UndecodableError, match="use about 14"):
        decode_image(png(reflectance), 1)
    grey = grey_of(png(reflectance), bit_depth=14)
    assert (grey[0, :3] == 255).all()
    assert np.array_equal(grey[1:], reflectance[1:] >> 6)


@pytest.mark.parametrize(
    ("bits", "tags", "contents"),
    [
        ((8,) * 13, {262: (1,)}, "13 unsigned samples of 8 bits per pixel"),
        ((16,), {262: (1,), 339: (3,)}, "1 floating-point samples of 16 bits per pixel"),
        ((10,), {262: (1,)}, "1 unsigned samples of 10 bits per pixel"),
    ],
)
def test_a_tiff_that_pillow_does_not_know_says_what_it_holds(
    bits: tuple[int, ...], tags: dict[int, tuple[int, ...]], contents: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UndecodableError, match=f"a TIFF of {contents} .* is not supported"):
        decode_image(tiff_file((4, 4), bits, bytes(512), tags), 3)
    assert not caplog.records


def test_colours_of_16_bits_that_use_12() -> None:
    with pytest.raises(UndecodableError, match="stored in 16 bits"):
        decode_image(rgb_tiff_16(RAMP_12), 3)
    with pytest.raises(UndecodableError, match="of which 12 are used, are not supported"):
        decode_image(rgb_tiff_16(RAMP_12), 3, bit_depth=12)
    assert np.array_equal(np.asarray(decode_image(rgb_tiff_16(RAMP_16), 3))[..., 1], RAMP_16 >> 8)
    assert np.array_equal(np.asarray(decode_image(rgb_tiff_16(RAMP_12), 3, bit_depth=16))[..., 1], RAMP_12 >> 8)


@pytest.mark.parametrize("data", [tiff(12, RAMP_12), png(RAMP_12)], ids=["tiff", "png"])
def test_a_run_that_was_begun_before_reads_as_before(data: bytes) -> None:
    assert np.array_equal(grey_of(data, version=1), RAMP_12 >> 8)


def test_a_run_that_was_begun_before_reads_white_as_before() -> None:
    assert np.array_equal(grey_of(tiff(16, RAMP_16, white_is_zero=True), version=1), RAMP_16 >> 8)


@pytest.mark.parametrize(
    ("bits", "tags", "reason"),
    [
        ((8,), {262: (1,), 339: (2,)}, "signed pixels"),
        ((8,), {262: (3,), 320: tuple(range(256)) * 3}, "a colour map of 8 bits"),
        ((16, 16, 16), {262: (2,), 284: (2,)}, "planes of 16 bits"),
    ],
)
def test_a_tiff_that_pillow_misreads_is_refused(bits: tuple[int, ...], tags: Any, reason: str) -> None:
    data = tiff_file((4, 4), bits, bytes(range(16)) * 6, tags)
    with pytest.raises(UndecodableError, match=f"{reason} in a TIFF"):
        decode_image(data, 3)
    if bits == (8,):
        decode_image(data, 3, version=1)  # runs begun before read it as before


def test_the_manifest_holds_the_bit_depth(tmp_path: Path) -> None:
    """Packing, indexing again and verifying read by it; another one drops the pixel statistics."""
    for name in ("cat", "dog"):
        for number in range(4):
            (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name / f"{number}.png").write_bytes(png(RAMP_12 // (number + 1)))
    out = tmp_path / "out"
    pack_folder(tmp_path / "in", out, bit_depth=12, val_fraction=0.25)
    manifest = read_manifest(out)
    assert manifest.mean is not None
    assert manifest.bit_depth == 12
    assert manifest.mean[0] == pytest.approx(0.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, abs=0.1)
    assert verify_dataset(open_unchecked_dataset(str(out), None), full=True, workers=1) == []
    assert index_folder(str(out), rebuild=True).bit_depth == 12
    warnings: list[str] = []
    assert index_folder(str(out), bit_depth=16, on_warning=warnings.append).mean is None
    assert "of another bit depth; they were removed" in warnings[0]
    (out / "manifest.json").unlink()
    index_folder(str(out))
    assert "bit_depth" not in (out / "manifest.json").read_text(), "foveal 0.1 reads the manifest"
    faults = verify_dataset(open_unchecked_dataset(str(out), None), full=True, workers=1)
    assert len(faults) == 8
    assert "--bit-depth" in faults[0]


def test_libtiff_writes_nothing_to_stderr(tmp_path: Path) -> None:
    """An unknown tag is a warning of libtiff's, damaged LZW data its error; in a process of its own: it is C's stderr."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        stream, "TIFF", compression="tiff_lzw", tiffinfo={65000: "x"}
    )
    damaged = bytearray(stream.getvalue())
    damaged[60:200] = bytes(140)
    (tmp_path / "damaged.tif").write_bytes(damaged)
    program = (
        "import sys; from foveal.data.image.decode import UndecodableError, decode_image\n"
        "try: decode_image(open(sys.argv[1], 'rb').read(), 3)\n"
        "except UndecodableError as error: print('undecodable', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "damaged.tif"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("undecodable")
    assert done.stderr == ""
