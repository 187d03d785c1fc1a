"""The grid of reconstructions: what is the original's, what is predicted, and what is borrowed for the eye."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.inspect.image_grid import GAP, MARGIN, MIN_IMAGE_SIDE
from foveal.inspect.reconstruction import DEVIATIONS, GREY, draw_reconstruction_grid
from foveal.models.patches import build_reconstruction_targets, split_patches_by_noise

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)
SIDE, PATCH = MIN_IMAGE_SIDE, 32


def perfect_prediction(
    channels: int, norm_pix: bool, side: int = SIDE, patch: int = PATCH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    _, masked = split_patches_by_noise(torch.rand(2, (side // patch) ** 2), 0.75)
    return images, build_reconstruction_targets((images / 255 - mean) / std, masked, patch, norm_pix), masked


def as_pixels(image: torch.Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(int)


def columns(grid: Image.Image, first_image: np.ndarray, row: int, number: int) -> list[np.ndarray]:
    """The images of a row of the grid, without the text above: the first image tells where the rows begin."""
    pixels = np.asarray(grid).astype(int)
    tops = (top for top in range(200) if np.array_equal(pixels[top : top + SIDE, MARGIN : MARGIN + SIDE], first_image))
    top = next(tops) + row * (SIDE + GAP)
    lefts = (MARGIN + column * (SIDE + GAP) for column in range(number))
    return [pixels[top : top + SIDE, left : left + SIDE] for left in lefts]


def windows(masked: torch.Tensor) -> list[tuple[bool, tuple[slice, slice]]]:
    """Whether each patch is masked, and where it is."""
    rows = SIDE // PATCH
    corners = [(index // rows * PATCH, index % rows * PATCH) for index in range(rows * rows)]
    return [
        (index in masked.tolist(), (slice(top, top + PATCH), slice(left, left + PATCH)))
        for index, (top, left) in enumerate(corners)
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_guess_gives_back_the_image(channels: int, norm_pix: bool) -> None:
    images, pred, masked = perfect_prediction(channels, norm_pix)
    grid = draw_reconstruction_grid(
        images, pred, masked, mean=MEAN[:channels], std=STD[:channels], norm_pix=norm_pix, title="After step 7 of 9"
    )
    for row in range(2):
        original, visible, *rest = columns(grid, as_pixels(images[0]), row, 5 if norm_pix else 3)
        assert np.array_equal(original, as_pixels(images[row]))
        assert np.abs(rest[-1] - original).max() <= 1
        if norm_pix:
            assert np.abs(rest[0] - rest[1]).max() <= 1, "the prediction as it is equals its target"
        for is_masked, window in windows(masked[row]):
            assert (visible[window] == GREY).all() if is_masked else np.array_equal(visible[window], original[window])


def test_a_prediction_of_nothing_is_shown_as_nothing() -> None:
    """Zeros are each patch's mean: pasted with the original's brightness they look like a coarse image."""
    images, pred, masked = perfect_prediction(3, norm_pix=True)
    grid = draw_reconstruction_grid(images, pred * 0, masked, mean=MEAN, std=STD, norm_pix=True)
    _, _, target, predicted, flattered = columns(grid, as_pixels(images[0]), 0, 5)
    for is_masked, window in windows(masked[0]):
        if is_masked:
            assert (predicted[window] == GREY).all()
            assert not (flattered[window] == GREY).all()
        else:
            assert np.array_equal(predicted[window], target[window])
    pixels = target[:PATCH, :PATCH].astype(float)
    assert pixels.std() == pytest.approx(127 / DEVIATIONS, rel=0.05)


def test_a_wrong_guess_is_pasted_only_where_it_was_made() -> None:
    images, pred, masked = perfect_prediction(3, norm_pix=False)
    grid = draw_reconstruction_grid(images, pred + 100, masked, mean=MEAN, std=STD, norm_pix=False)
    original, _, reconstruction = columns(grid, as_pixels(images[0]), 0, 3)
    for is_masked, window in windows(masked[0]):
        assert (reconstruction[window] != original[window]).any() == is_masked
    assert reconstruction.max() == 255
