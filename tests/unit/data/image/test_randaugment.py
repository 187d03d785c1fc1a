"""RandAugment: each operation against timm, random numbers per sample, evaluation unchanged."""

from collections.abc import Callable

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
from PIL import Image

from foveal.data.config import DataConfig, RandAugmentConfig
from foveal.data.dataset import Dataset
from foveal.data.image.randaugment import _OPERATIONS, UNIFORMS_PER_OP, rand_augment
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set

NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
# Interpolation, or rounding at another step, makes small differences in few pixels.
ROUGH = {
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
    "SharpnessIncreasing",
    "AutoContrast",
    "Equalize",
}


def photograph() -> np.ndarray:
    rows, columns = np.mgrid[0:40, 0:48]
    noise = np.random.default_rng(0).integers(0, 20, (40, 48))
    return np.stack([rows * 5 + noise, columns * 4 + noise, (rows + columns) * 2 + noise]).clip(0, 235).astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [3.0, 9.0])
def test_a_change_is_timms(name: str, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image, number = photograph(), NAMES.index(name)
    monkeypatch.setattr(timm_augment.random, "random", lambda: 0.0)  # never negated
    hparams = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR}
    op = timm_augment.AugmentOp(name, prob=1.0, magnitude=int(magnitude), hparams=hparams)
    expected = np.asarray(op(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1).astype(int)
    row = np.zeros((1, UNIFORMS_PER_OP), np.float32)
    row[0, 1] = (number + 0.5) / len(_OPERATIONS)  # the operation; applied, positive, and a normal number of 0
    augmented = rand_augment(image, row, RandAugmentConfig(ops=1, magnitude=magnitude)).astype(int)
    assert augmented.shape == image.shape
    near = np.abs(augmented - expected) <= 2
    assert near.mean() > (0.9 if name in ROUGH else 0.999), near.mean()
    if name != "AutoContrast":
        assert (augmented != image).mean() > 0.05, "the operation changes nothing"


def test_there_are_as_many_as_timm_has() -> None:
    assert len(_OPERATIONS) == len(NAMES) == len(timm_augment._RAND_INCREASING_TRANSFORMS)
    assert set(NAMES) == set(timm_augment._RAND_INCREASING_TRANSFORMS)


def test_half_of_the_operations_are_done_and_a_draw_is_always_the_same() -> None:
    image, augment = photograph(), RandAugmentConfig(ops=1)
    uniforms = np.random.default_rng(1).random((400, 1, UNIFORMS_PER_OP), dtype=np.float32)
    changed = [bool((rand_augment(image, row, augment) != image).any()) for row in uniforms]
    assert 0.4 < np.mean(changed) < 0.55
    assert all(
        np.array_equal(rand_augment(image, row, augment), rand_augment(image, row, augment)) for row in uniforms[:5]
    )


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
                training, cfg, rank=rank, world_size=world_size, microbatch_size=8, start_step=0, stop_step=2
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
