"""Decoding, cropping and normalising: against Pillow, torchvision and NumPy."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor

from foveal.data import normalise
from foveal.data.config import AugmentConfig
from foveal.data.transforms import COLUMNS, decode, evaluation_view, pixels, training_view
from foveal.seeding import key, uniforms_numpy


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((180, 120), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_eight_bits_becomes_grey_or_rgb(photo: Image.Image, mode: str) -> None:
    data = encoded(photo.convert(mode))
    assert decode(data, 1).mode == "L"
    assert decode(data, 3).mode == "RGB"
    assert decode(data, 3).size == (180, 120)


def test_cmyk_jpeg_and_transparent_palette_decode(photo: Image.Image) -> None:
    assert decode(encoded(photo.convert("CMYK"), "JPEG"), 3).mode == "RGB"
    palette = photo.convert("P")
    palette.info["transparency"] = bytes(range(256))
    assert decode(encoded(palette), 3).mode == "RGB"


def test_lossless_pixels_come_back(photo: Image.Image) -> None:
    assert np.array_equal(np.asarray(decode(encoded(photo), 3)), np.asarray(photo))


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_bytes_that_are_no_image_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_image_is_never_padded_with_grey(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    with pytest.raises(ValueError, match=r"truncated|cut|broken|incomplete"):
        decode(data[: len(data) // 2], 3)


def test_sixteen_bits_are_refused_not_clipped() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"mode I;16 are not supported"):
        decode(encoded(deep), 1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ValueError, match=r"180x120 pixels|decompression bomb"):
        decode(encoded(photo), 3)


def test_crops_are_distributed_as_torchvisions() -> None:
    width, height, draws = 160, 120, 4000
    augment = AugmentConfig(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    numbers = uniforms_numpy(key(0, "test"), np.arange(draws), COLUMNS)
    ours = np.array([training_view(width, height, row, augment)[0] for row in numbers])
    torch.manual_seed(0)
    theirs = RandomResizedCrop(8, scale=augment.scale, ratio=augment.ratio)
    params = [theirs.make_params([torch.empty(3, height, width)]) for _ in range(draws)]
    other = np.array([[p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]] for p in params])
    for statistic in (corners, shapes):
        # 4,000 draws: the standard error of a quantile is under 1 pixel, areas are in units of 150 pixels
        for level in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(statistic(ours), level, axis=0) - np.quantile(statistic(other), level, axis=0)
            assert np.abs(difference).max() <= 5
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()
    assert (ours >= 0).all()


def corners(boxes: np.ndarray) -> np.ndarray:
    return boxes


def shapes(boxes: np.ndarray) -> np.ndarray:
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return np.stack([across * down / 150, across, down, 60 * across / down], axis=1)


def test_place_shape_and_flip_are_independent() -> None:
    numbers = uniforms_numpy(key(4), np.arange(4000), COLUMNS)
    views = [training_view(100, 100, row, AugmentConfig(scale=(0.2, 0.3))) for row in numbers]
    boxes = np.array([box for box, _ in views])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    left, top = boxes[:, 0] / (100 - across), boxes[:, 1] / (100 - down)
    flips = np.array([float(flipped) for _, flipped in views])
    between = np.corrcoef(np.stack([left, top, across * down, across / down, flips]))
    assert np.abs(between - np.eye(5)).max() < 0.08  # five standard errors


def test_flips_have_their_probability() -> None:
    numbers = uniforms_numpy(key(1, "flip"), np.arange(2000), COLUMNS)
    for flip, low, high in ((0.0, 0, 0), (1.0, 2000, 2000), (0.5, 930, 1070)):
        count = sum(training_view(8, 8, row, AugmentConfig(flip=flip))[1] for row in numbers)
        assert low <= count <= high


def test_a_view_without_choice_is_the_whole_square() -> None:
    whole = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    for row in uniforms_numpy(key(2), np.arange(20), COLUMNS):
        assert training_view(8, 8, row, whole) == ((0, 0, 8, 8), False)
        assert training_view(30, 10, row, whole) == ((10, 0, 20, 10), False)


def test_extreme_shapes_still_give_a_crop() -> None:
    numbers = uniforms_numpy(key(3), np.arange(50), COLUMNS)
    for width, height in ((1, 1), (1, 500), (500, 1), (2, 3)):
        for row in numbers:
            (left, top, right, bottom), _ = training_view(width, height, row, AugmentConfig())
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_evaluation_is_resize_and_centre_crop(photo: Image.Image) -> None:
    """64 / 0.8 = 80: the shorter side 120 becomes 80, the longer 180 becomes 120, the centre 64 is cut out."""
    ours = pixels(photo, evaluation_view(180, 120, 0.8), False, 64, "bicubic")
    resized = photo.resize((120, 80), Image.Resampling.BICUBIC).crop((28, 8, 92, 72))
    theirs = pil_to_tensor(resized).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_pixels_are_channel_first_and_flipped_from_left_to_right(photo: Image.Image) -> None:
    straight = pixels(photo, (0, 0, 120, 120), False, 120, "bilinear")
    assert straight.shape == (3, 120, 120)
    assert np.array_equal(straight, np.asarray(photo)[:, :120].transpose(2, 0, 1))
    assert np.array_equal(pixels(photo, (0, 0, 120, 120), True, 120, "bilinear"), straight[:, :, ::-1])
    assert pixels(photo.convert("L"), (0, 0, 9, 9), False, 5, "bicubic").shape == (1, 5, 5)


def test_normalise_is_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images.numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    given = normalise(images, mean, std)
    assert given.dtype == torch.float32
    np.testing.assert_allclose(given.numpy(), expected, rtol=0, atol=1e-6)


def test_one_statistic_serves_three_channels() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(normalise(images, (0.5,), (0.25,)), normalise(images, (0.5,) * 3, (0.25,) * 3))
