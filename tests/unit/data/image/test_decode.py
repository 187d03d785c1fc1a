"""Pixels: within bounds of plain Pillow, upright, and the same with and without simplejpeg."""

import io
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, full_image, photo
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from foveal.data.config import AugmentConfig
from foveal.data.image import decode as module
from foveal.data.image.decode import CropFunction, decode_crop, decode_image, jpeg_decoder_and_version
from foveal.data.image.transforms import UNIFORMS_PER_CROP, CropBox, compute_eval_crop, compute_train_crop
from foveal.seeding import derive_key, draw_uniform_numpy

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ORIENTATION = 0x0112
LARGE = photo(640, 480)


def fixed_crop(box: CropBox, flipped: bool = False) -> CropFunction:
    return lambda _width, _height: (box, flipped)


def boxes(count: int) -> list[CropBox]:
    """Return training crops of LARGE."""
    uniforms = draw_uniform_numpy(derive_key(0, "test"), np.arange(count), UNIFORMS_PER_CROP)
    return [compute_train_crop(*LARGE.size, row, AugmentConfig())[0] for row in uniforms]


def by_pillow(image: Image.Image, box: CropBox, side: int, interpolation: str) -> np.ndarray:
    left, top, right, bottom = (round(edge) for edge in box)
    cut = image.crop((left, top, right, bottom))
    return np.asarray(cut.resize((side, side), FILTERS[interpolation])).transpose(2, 0, 1)


def difference(pixels: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(pixels.astype(int) - expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_full_decode_is_pillows_within_rounding(interpolation: str) -> None:
    data = encoded(LARGE, quality=90)
    plain = Image.open(io.BytesIO(data))
    for box in boxes(30):
        pixels = decode_crop(data, 3, fixed_crop(box), (224, 224), interpolation, False)
        differences = difference(pixels, by_pillow(plain, box, 224, interpolation))
        assert differences.max() <= 3
        assert differences.mean() <= 0.3  # of 255


def test_a_scaled_decode_shows_what_a_full_one_shows() -> None:
    """Mean within 6 of 255 (photographs: 4) of the full decode of the same pixels.

    The crop's edges lie on the coarser grid, so they move by at most half of its pixels.
    """
    data = encoded(LARGE, quality=90)
    plain = Image.open(io.BytesIO(data))
    for side, scale in ((224, 2), (112, 4), (56, 8)):
        for box in boxes(300):
            if min(box[2] - box[0], box[3] - box[1]) < scale * side:
                continue
            pixels = decode_crop(data, 3, fixed_crop(box), (side, side), "bicubic", True)
            left, top, right, bottom = (int(edge / scale + 0.5) * scale for edge in box)
            differences = difference(pixels, by_pillow(plain, (left, top, right, bottom), side, "bicubic"))
            assert differences.mean() <= 6
            assert np.quantile(differences, 0.99) <= 40


@settings(max_examples=200)
@given(st.data())
def test_scaling_leaves_every_crop_enough_pixels(data: st.DataObject) -> None:
    """The factor is the largest suitable of 8, 4, 2, and 1 if none is suitable or scaling is off."""
    side = data.draw(st.integers(2, 40))
    width, height = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    crop_width, crop_height = data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
    scaling, installed = data.draw(st.booleans()), data.draw(st.booleans())
    file = encoded(Image.new("RGB", (width, height), (9, 99, 200)))
    box = (left, top, left + crop_width, top + crop_height)
    sizes: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_resize", lambda array, *rest: sizes.append(array.shape[:2]) or resize_pixels(array, *rest)
        )
        patch.setattr(module, "simplejpeg", module.simplejpeg if installed else None)
        square = decode_crop(file, 3, fixed_crop(box), (side, side), "bicubic", scaling)
    shorter = min(crop_width, crop_height)
    scale = next((factor for factor in (8, 4, 2) if scaling and shorter >= factor * side), 1)
    assert square.shape == (3, side, side)
    assert difference(square, np.array([9, 99, 200])[:, None, None]).max() <= 4  # no pixel from outside the image
    assert min(sizes[0]) >= min(side, shorter)
    assert abs(sizes[0][0] - crop_height / scale) <= 1 and abs(sizes[0][1] - crop_width / scale) <= 1


resize_pixels = module._resize


@pytest.mark.skipif(module.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"keep_rgb": True}])
def test_both_decoders_give_the_same_pixels(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(LARGE.convert(mode), **(options if mode == "RGB" or "keep_rgb" not in options else {}))
    for channels in (1, 3):
        for side, scaling in ((224, False), (224, True), (100, True), (50, True)):
            monkeypatch.undo()
            fast = decode_crop(data, channels, fixed_crop((31, 17, 531, 467), True), (side, side), "bicubic", scaling)
            monkeypatch.setattr(module, "simplejpeg", None)
            assert np.array_equal(
                fast,
                decode_crop(data, channels, fixed_crop((31, 17, 531, 467), True), (side, side), "bicubic", scaling),
            )


def test_the_decoder_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if module.simplejpeg is not None:
        assert jpeg_decoder_and_version() == f"simplejpeg {version('simplejpeg')}"
    monkeypatch.setattr(module, "simplejpeg", None)
    assert jpeg_decoder_and_version() == f"Pillow {version('Pillow')}"


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_honoured(kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ImageOps.exif_transpose, in ``decode_image`` and under an off-centre crop; 0 and 9 are no orientations."""
    small = LARGE.resize((90, 60))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(small, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data, 3)), np.asarray(upright))
    box = (5, 20, 45, 58)
    plain = encoded(upright, "PNG")
    sizes: list[tuple[int, int]] = []

    def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
        sizes.append((width, height))
        return box, True

    for decoder in (module.simplejpeg, None):
        monkeypatch.setattr(module, "simplejpeg", decoder)
        turned = decode_crop(data, 3, choose_crop, (16, 24), "bicubic", False)
        assert difference(turned, decode_crop(plain, 3, choose_crop, (16, 24), "bicubic", False)).max() <= 1
    assert set(sizes) == {upright.size}


def test_scaled_and_turned_is_turned_and_scaled() -> None:
    """A rotated JPEG whose size is no multiple of 8, decoded scaled: off by less than a pixel of the coarser grid."""
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    ramp = Image.fromarray(np.add.outer(np.arange(203) / 2, np.arange(301) / 2).astype(np.uint8)).convert("RGB")
    data = encoded(ramp, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    for box in ((0, 0, 203, 301), (3, 5, 199, 280), (103, 201, 203, 301)):
        pixels = decode_crop(data, 3, fixed_crop(box), (24, 24), "bicubic", True)
        assert (
            difference(pixels, by_pillow(upright, box, 24, "bicubic")).max() <= 6
        )  # 4 brightness steps a coarse pixel


def test_evaluation_is_resize_and_centre_crop() -> None:
    """480 is resized to 64 / 0.8 = 80, 640 to 107, then the centre 64 is cropped: all but the border agrees."""
    image = LARGE.crop((0, 0, 480, 480))
    pixels = decode_crop(
        encoded(image, "PNG"), 3, lambda w, h: (compute_eval_crop(w, h, 0.8), False), (64, 64), "bicubic", True
    )
    expected = center_crop(resize(pil_to_tensor(image), [80, 80], FILTERS["bicubic"]), [64, 64]).numpy()
    assert difference(pixels, expected)[:, 2:-2, 2:-2].max() <= 2
    assert difference(pixels, expected).mean() <= 0.5


def test_pixels_are_channel_first_and_flipped_from_left_to_right() -> None:
    data = encoded(LARGE, "PNG")
    straight = decode_crop(data, 3, fixed_crop((10, 20, 130, 140)), (120, 120), "bilinear", True)
    assert straight.shape == (3, 120, 120)
    assert straight.dtype == np.uint8
    assert np.array_equal(straight, np.asarray(LARGE)[20:140, 10:130].transpose(2, 0, 1))
    flipped = decode_crop(data, 3, fixed_crop((10, 20, 130, 140), True), (120, 120), "bilinear", True)
    assert np.array_equal(flipped, straight[:, :, ::-1])
    assert decode_crop(data, 1, full_image, (5, 5), "bicubic", True).shape == (1, 5, 5)


def test_an_image_may_be_wider_than_high() -> None:
    box = (10, 20, 250, 140)
    pixels = decode_crop(encoded(LARGE, "PNG"), 3, fixed_crop(box), (24, 48), "bicubic", True)
    by_pillow = np.asarray(LARGE.crop(box).resize((48, 24), FILTERS["bicubic"])).transpose(2, 0, 1)
    assert pixels.shape == (3, 24, 48)
    assert difference(pixels, by_pillow).max() <= 2
    flat = fixed_crop((10, 20, 250, 60))  # wide enough for half the JPEG's size, not high enough
    unscaled, scaled = (decode_crop(encoded(LARGE), 3, flat, (24, 48), "bicubic", scaling) for scaling in (False, True))
    assert np.array_equal(unscaled, scaled)


def test_what_a_view_raises_is_not_the_images_fault() -> None:
    def broken(width: int, height: int) -> tuple[CropBox, bool]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode_crop(encoded(LARGE), 3, broken, (8, 8), "bicubic", True)
