"""RandAugment: each operation against timm, random numbers per sample, evaluation unchanged."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
from PIL import Image

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.randaugment import _OPERATIONS, UNIFORMS_PER_OP, rand_augment
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set

NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def config(
    channels: int = 3, interpolation: str = "bicubic", decode_version: int = 2, **rand_augment: Any
) -> DataConfig:
    augment = {"interpolation": interpolation, "rand_augment": {"ops": 1} | rand_augment}
    tree = {"path": "", "image_size": 40, "channels": channels, "decode_version": decode_version, "augment": augment}
    return DataConfig.from_dict(tree, "here")


def draw(name: str, sign: float = 0.0) -> np.ndarray:
    """The uniform numbers of one applied operation with its mean strength."""
    row = np.zeros((1, UNIFORMS_PER_OP), np.float32)
    row[0, 1:3] = (NAMES.index(name) + 0.5) / len(_OPERATIONS), sign
    return row


def timms(image: np.ndarray, name: str, magnitude: float, fill: tuple[int, ...], interpolation: str) -> np.ndarray:
    """The image after timm's operation; ``fill`` per channel."""
    colour = fill if image.shape[0] > 1 else next(iter(fill))
    hparams = {"img_mean": colour, "interpolation": Image.Resampling[interpolation.upper()]}
    op = timm_augment.AugmentOp(name, prob=1.0, magnitude=int(magnitude), hparams=hparams)
    made = np.asarray(op(Image.fromarray(image.transpose(1, 2, 0).squeeze()))).reshape(*image.shape[1:], -1)
    return made.transpose(2, 0, 1).astype(int)


def photograph() -> np.ndarray:
    rows, columns = np.mgrid[0:40, 0:48]
    noise = np.random.default_rng(0).integers(0, 20, (40, 48))
    return np.stack([rows * 5 + noise, columns * 4 + noise, (rows + columns) * 2 + noise]).clip(0, 235).astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [3.0, 9.0])
def test_a_change_is_timms(name: str, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph()
    monkeypatch.setattr(timm_augment.random, "random", lambda: 0.0)  # never negated
    expected = timms(image, name, magnitude, (124, 116, 104), "bicubic")
    augmented = rand_augment(image, draw(name), config(magnitude=magnitude), IMAGENET_MEAN).astype(int)
    assert augmented.shape == image.shape
    if name in GEOMETRIC:
        assert np.array_equal(augmented, expected)
    assert np.abs(augmented - expected).max() <= 1, "colours are rounded at another step"
    if name != "AutoContrast":
        assert (augmented != image).mean() > 0.05, "the operation changes nothing"


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
@pytest.mark.parametrize("channels", [1, 3])
def test_geometry_is_timms_in_either_direction_of_grey_images_too_and_bilinear_if_crops_are(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mean = photograph()[:channels], IMAGENET_MEAN[:channels]
    monkeypatch.setattr(timm_augment.random, "random", lambda: 0.9)  # always negated
    for interpolation in ("bicubic", "bilinear"):
        expected = timms(image, name, 7, (124, 116, 104)[:channels], interpolation)
        cfg = config(channels, interpolation, magnitude=7.0)
        assert np.array_equal(rand_augment(image, draw(name, sign=0.9), cfg, mean), expected)


@pytest.mark.parametrize("name", NAMES)
def test_runs_before_version_2_are_bilinear_on_grey(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph()
    monkeypatch.setattr(timm_augment.random, "random", lambda: 0.0)
    expected = timms(image, name, 9, (128, 128, 128), "bilinear")
    cfg = config(decode_version=1, magnitude=9.0)
    near = np.abs(rand_augment(image, draw(name), cfg, IMAGENET_MEAN).astype(int) - expected) <= 2
    assert near.mean() > (0.9 if name in GEOMETRIC else 0.999), near.mean()


def test_the_old_geometry_is_that_of_0_1() -> None:
    """Sums of the pixels that 0.1.0 made, and of their products with their places; processors round a few otherwise."""
    image, cfg = photograph(), config(decode_version=1, magnitude=9.0)
    places = np.arange(image.size).reshape(image.shape)
    sums = {}
    for name in sorted(GEOMETRIC):
        pixels = rand_augment(image, draw(name, sign=0.9), cfg, IMAGENET_MEAN).astype(np.int64)
        sums[name] = [int(pixels.sum()), int((pixels * places).sum())]
    expected = {
        "Rotate": [607513, 1791243121],
        "ShearX": [568129, 1665309152],
        "ShearY": [562650, 1641900487],
        "TranslateXRel": [581083, 1655862221],
        "TranslateYRel": [582886, 1665608862],
    }
    for name, numbers in expected.items():
        assert sums[name] == pytest.approx(numbers, rel=1e-5), name


def test_there_are_as_many_as_timm_has() -> None:
    assert len(_OPERATIONS) == len(NAMES) == len(timm_augment._RAND_INCREASING_TRANSFORMS)
    assert set(NAMES) == set(timm_augment._RAND_INCREASING_TRANSFORMS)


def test_half_of_the_operations_are_done_and_a_draw_is_always_the_same() -> None:
    image, cfg = photograph(), config()
    uniforms = np.random.default_rng(1).random((400, 1, UNIFORMS_PER_OP), dtype=np.float32)
    changed = [bool((rand_augment(image, row, cfg, IMAGENET_MEAN) != image).any()) for row in uniforms]
    assert 0.4 < np.mean(changed) < 0.55
    for row in uniforms[:5]:
        first, second = (rand_augment(image, row, cfg, IMAGENET_MEAN) for _ in range(2))
        assert np.array_equal(first, second)


def test_only_training_is_changed_and_on_any_ranks_alike(configure: Callable[..., DataConfig]) -> None:
    still = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0}
    plain, cfg = (configure(augment=still | {"rand_augment": {"ops": n}}) for n in (0, 2))
    assert plain.augment.is_deterministic
    assert not cfg.augment.is_deterministic

    def images(cfg: DataConfig, world_size: int = 1) -> np.ndarray:
        training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=32)
        rank_images = []
        for rank in range(world_size):
            with train_batches(
                training,
                cfg,
                rank=rank,
                world_size=world_size,
                microbatch_size=8,
                start_step=0,
                stop_step=2,
                mean=IMAGENET_MEAN[: cfg.channels],
            ) as batches:
                pixels = np.concatenate([batch.images.numpy() for batch in batches])
            rank_images.append(pixels.reshape(2, 32 // world_size, -1))
        return np.concatenate(rank_images, axis=1)

    assert np.array_equal(images(cfg), images(cfg, 2))
    differ = (images(cfg) != images(plain)).any(axis=2)
    assert 0.4 < differ.mean() < 0.95
    eval_images = []
    for eval_cfg in (plain, cfg):
        batches = eval_batches(
            Dataset.open(eval_cfg),
            eval_cfg,
            split="val",
            subset="all",
            training_seed=0,
            rank=0,
            world_size=1,
            microbatch_size=16,
        )
        eval_images.append(next(batches).images)
    assert eval_images[0].equal(eval_images[1])
