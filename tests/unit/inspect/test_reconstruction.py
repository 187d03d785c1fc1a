"""The grid of reconstructions: a perfect prediction reproduces the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.inspect.image_grid import GAP
from foveal.inspect.reconstruction import GREY, draw_reconstruction_grid
from foveal.models.patches import build_reconstruction_targets, split_patches_by_noise

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)


def perfect_prediction(
    channels: int, norm_pix: bool, side: int = 64, patch: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    _, masked = split_patches_by_noise(torch.rand(2, (side // patch) ** 2), 0.75)
    return images, build_reconstruction_targets((images / 255 - mean) / std, masked, patch, norm_pix), masked


def columns(grid: Image.Image, row: int, side: int) -> list[np.ndarray]:
    pixels = np.asarray(grid).astype(int)
    top = row * (side + GAP)
    return [pixels[top : top + side, left : left + side] for left in (0, side + GAP, 2 * (side + GAP))]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_guess_gives_back_the_image(channels: int, norm_pix: bool) -> None:
    images, pred, masked = perfect_prediction(channels, norm_pix)
    grid = draw_reconstruction_grid(images, pred, masked, mean=MEAN[:channels], std=STD[:channels], norm_pix=norm_pix)
    assert grid.size == (3 * 64 + 2 * GAP, 2 * 64 + GAP)
    for row in range(2):
        original, visible, reconstruction = columns(grid, row, 64)
        assert np.array_equal(original, images[row].expand(3, -1, -1).permute(1, 2, 0).numpy())
        assert np.abs(reconstruction - original).max() <= 1
        for index in range(16):
            window = np.s_[index // 4 * 16 : index // 4 * 16 + 16, index % 4 * 16 : index % 4 * 16 + 16]
            if index in masked[row].tolist():
                assert (visible[window] == GREY).all()
            else:
                assert np.array_equal(visible[window], original[window])


def test_a_wrong_guess_is_pasted_only_where_it_was_made() -> None:
    images, pred, masked = perfect_prediction(3, norm_pix=False)
    grid = draw_reconstruction_grid(images, pred + 100, masked, mean=MEAN, std=STD, norm_pix=False)
    original, _, reconstruction = columns(grid, 0, 64)
    changed = (reconstruction != original).any(axis=2).reshape(4, 16, 4, 16).any(axis=(1, 3)).flatten()
    assert np.flatnonzero(changed).tolist() == sorted(masked[0].tolist())
    assert reconstruction.max() == 255


def test_small_images_are_enlarged() -> None:
    images, pred, masked = perfect_prediction(1, norm_pix=True, side=8, patch=2)
    grid = draw_reconstruction_grid(images, pred, masked, mean=MEAN[:1], std=STD[:1], norm_pix=True)
    original = columns(grid, 0, 64)[0]
    assert np.array_equal(original[::8, ::8, 0], images[0, 0].numpy())
