"""The sheet of reconstructions: a perfect guess gives back the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.inspect.image_grid import GAP
from foveal.inspect.reconstruction import GREY, draw_reconstruction_grid
from foveal.models.patches import build_reconstruction_targets, split_patches_by_noise

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)


def guessed(
    channels: int, normalise: bool, side: int = 64, patch: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(told[:channels]).view(-1, 1, 1) for told in (MEAN, STD))
    _, masked = split_patches_by_noise(torch.rand(2, (side // patch) ** 2), 0.75)
    return images, build_reconstruction_targets((images / 255 - mean) / std, masked, patch, normalise), masked


def columns(sheet: Image.Image, row: int, side: int) -> list[np.ndarray]:
    pixels = np.asarray(sheet).astype(int)
    down = row * (side + GAP)
    return [pixels[down : down + side, across : across + side] for across in (0, side + GAP, 2 * (side + GAP))]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_perfect_guess_gives_back_the_image(channels: int, normalise: bool) -> None:
    images, pred, masked = guessed(channels, normalise)
    sheet = draw_reconstruction_grid(images, pred, masked, mean=MEAN[:channels], std=STD[:channels], norm_pix=normalise)
    assert sheet.size == (3 * 64 + 2 * GAP, 2 * 64 + GAP)
    for row in range(2):
        original, seen, guess = columns(sheet, row, 64)
        assert np.array_equal(original, images[row].expand(3, -1, -1).permute(1, 2, 0).numpy())
        assert np.abs(guess - original).max() <= 1
        for place in range(16):
            window = np.s_[place // 4 * 16 : place // 4 * 16 + 16, place % 4 * 16 : place % 4 * 16 + 16]
            if place in masked[row].tolist():
                assert (seen[window] == GREY).all()
            else:
                assert np.array_equal(seen[window], original[window])


def test_a_wrong_guess_is_pasted_only_where_it_was_made() -> None:
    images, pred, masked = guessed(3, normalise=False)
    sheet = draw_reconstruction_grid(images, pred + 100, masked, mean=MEAN, std=STD, norm_pix=False)
    original, _, guess = columns(sheet, 0, 64)
    changed = (guess != original).any(axis=2).reshape(4, 16, 4, 16).any(axis=(1, 3)).flatten()
    assert np.flatnonzero(changed).tolist() == sorted(masked[0].tolist())
    assert guess.max() == 255


def test_small_images_are_enlarged() -> None:
    images, pred, masked = guessed(1, normalise=True, side=8, patch=2)
    sheet = draw_reconstruction_grid(images, pred, masked, mean=MEAN[:1], std=STD[:1], norm_pix=True)
    original = columns(sheet, 0, 64)[0]
    assert np.array_equal(original[::8, ::8, 0], images[0, 0].numpy())
