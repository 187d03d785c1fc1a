"""Crops and normalisation, against torchvision and NumPy."""

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.transforms.v2 import RandomResizedCrop

from foveal.data.config import AugmentConfig
from foveal.data.image.transforms import UNIFORMS_PER_CROP, compute_eval_crop, compute_train_crop, normalise
from foveal.seeding import derive_key, draw_uniform_numpy


def test_crops_are_distributed_as_torchvisions() -> None:
    width, height, num_crops = 160, 120, 4000
    augment = AugmentConfig(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    uniforms = draw_uniform_numpy(derive_key(0, "test"), np.arange(num_crops), UNIFORMS_PER_CROP)
    crops = np.array([compute_train_crop(width, height, row, augment)[0] for row in uniforms])
    torch.manual_seed(0)
    transform = RandomResizedCrop(8, scale=augment.scale, ratio=augment.ratio)
    params = [transform.make_params([torch.empty(3, height, width)]) for _ in range(num_crops)]
    expected = np.array([[p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]] for p in params])
    for statistic in (corners, shapes):
        # 4,000 draws: the standard error of a quantile is under 1 pixel, areas are in units of 150 pixels
        for level in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(statistic(crops), level, axis=0) - np.quantile(statistic(expected), level, axis=0)
            assert np.abs(difference).max() <= 5
    assert (crops[:, 2] <= width).all()
    assert (crops[:, 3] <= height).all()
    assert (crops >= 0).all()


def corners(boxes: np.ndarray) -> np.ndarray:
    return boxes


def shapes(boxes: np.ndarray) -> np.ndarray:
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return np.stack([width * height / 150, width, height, 60 * width / height], axis=1)


def test_place_shape_and_flip_are_independent() -> None:
    uniforms = draw_uniform_numpy(derive_key(4), np.arange(4000), UNIFORMS_PER_CROP)
    views = [compute_train_crop(100, 100, row, AugmentConfig(scale=(0.2, 0.3))) for row in uniforms]
    boxes = np.array([box for box, _ in views])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    left, top = boxes[:, 0] / (100 - width), boxes[:, 1] / (100 - height)
    flips = np.array([float(flipped) for _, flipped in views])
    correlation = np.corrcoef(np.stack([left, top, width * height, width / height, flips]))
    assert np.abs(correlation - np.eye(5)).max() < 0.08  # five standard errors


def test_flips_have_their_probability() -> None:
    uniforms = draw_uniform_numpy(derive_key(1, "flip"), np.arange(2000), UNIFORMS_PER_CROP)
    for flip, low, high in ((0.0, 0, 0), (1.0, 2000, 2000), (0.5, 930, 1070)):
        count = sum(compute_train_crop(8, 8, row, AugmentConfig(hflip=flip))[1] for row in uniforms)
        assert low <= count <= high


def test_a_view_without_choice_is_the_whole_square() -> None:
    augment = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    for row in draw_uniform_numpy(derive_key(2), np.arange(20), UNIFORMS_PER_CROP):
        assert compute_train_crop(8, 8, row, augment) == ((0, 0, 8, 8), False)
        assert compute_train_crop(30, 10, row, augment) == ((10, 0, 20, 10), False)
        assert compute_train_crop(11, 10, row, augment) == ((0, 0, 10, 10), False), (
            "one pixel off the square: no position is drawn"
        )


def test_a_view_without_choice_has_the_shape_of_what_it_becomes() -> None:
    augment = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    for row in draw_uniform_numpy(derive_key(2), np.arange(20), UNIFORMS_PER_CROP):
        assert compute_train_crop(90, 30, row, augment, (8, 16)) == ((15, 0, 75, 30), False)
        assert compute_train_crop(30, 90, row, augment, (8, 16)) == ((0, 37, 30, 52), False)
    assert compute_eval_crop(90, 30, 1.0, (8, 16)) == (15, 0, 75, 30)
    assert compute_eval_crop(40, 90, 0.5, (8, 16)) == (10, 40, 30, 50)


def test_crops_keep_their_shapes_around_that_of_the_image() -> None:
    uniforms = draw_uniform_numpy(derive_key(5), np.arange(2000), UNIFORMS_PER_CROP)
    boxes = np.array(
        [compute_train_crop(300, 300, row, AugmentConfig(scale=(0.1, 0.2)), (32, 64))[0] for row in uniforms]
    )
    ratios = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert 1.4 < ratios.min() < 1.55
    assert 2.6 < ratios.max() < 2.8
    assert abs(np.median(ratios) - 2) < 0.1


def test_extreme_shapes_still_give_a_crop() -> None:
    uniforms = draw_uniform_numpy(derive_key(3), np.arange(50), UNIFORMS_PER_CROP)
    for width, height in ((1, 1), (1, 500), (500, 1), (2, 3)):
        for row in uniforms:
            (left, top, right, bottom), _ = compute_train_crop(width, height, row, AugmentConfig())
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_normalise_is_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images.numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    normalised = normalise(images, mean, std)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=0, atol=1e-6)


def test_one_statistic_serves_three_channels() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(normalise(images, (0.5,), (0.25,)), normalise(images, (0.5,) * 3, (0.25,) * 3))


def test_normalise_leaves_its_argument_alone() -> None:
    images = torch.rand(2, 3, 4, 4)
    before = images.clone()
    normalise(images, (0.5,), (0.25,))
    assert torch.equal(images, before)


def test_normalise_is_the_same_after_a_step_on_fake_tensors() -> None:
    """Regression: constants cached during the trace of `foveal plan` disabled normalisation in later steps."""
    images, mean, std = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), (0.375,), (0.125,)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(normalise(images, mean, std), FakeTensor)
    assert torch.equal(normalise(images, mean, std), torch.full((1, 1, 2, 2), 5.0))
