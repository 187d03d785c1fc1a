"""Patches, targets, masks and loss against loops in float64, and the proof that what is masked cannot be seen."""

import math

import numpy as np
import pytest
import torch
from encoders import KINDS, autoencoder_of

from foveal.models.config import DecoderConfig, Positions, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.masks import MASK_NOISE_FUNCTIONS
from foveal.models.patches import (
    build_reconstruction_targets,
    patchify,
    reconstruction_loss,
    split_patches_by_noise,
    unpatchify,
)
from foveal.models.vit import build_encoder

PATCH = 4


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def patches_by_loops(images: np.ndarray, patch: int) -> np.ndarray:
    batch, channels, height, width = images.shape
    across = width // patch
    out = np.zeros((batch, (height // patch) * across, channels * patch * patch))
    for image in range(batch):
        for y in range(height):
            for x in range(width):
                for channel in range(channels):
                    place = y // patch * across + x // patch
                    number = (channel * patch + y % patch) * patch + x % patch
                    out[image, place, number] = images[image, channel, y, x]
    return out


def targets_by_loops(images: np.ndarray, masked: np.ndarray, normalise: bool) -> np.ndarray:
    patches = patches_by_loops(images, PATCH)
    out = np.zeros((*masked.shape, patches.shape[2]))
    for image in range(masked.shape[0]):
        for slot in range(masked.shape[1]):
            patch = patches[image, masked[image, slot]]
            if normalise:
                mean = sum(patch) / len(patch)
                variance = sum((number - mean) ** 2 for number in patch) / (len(patch) - 1)
                patch = (patch - mean) / (variance + 1e-6) ** 0.5
            out[image, slot] = patch
    return out


def test_patches(images: torch.Tensor) -> None:
    expected = patches_by_loops(images.double().numpy(), PATCH)
    assert np.array_equal(patchify(images.double(), PATCH).numpy(), expected)
    assert torch.equal(unpatchify(torch.from_numpy(expected), PATCH, 4, 6), images.double())


@pytest.mark.parametrize("normalise", [False, True])
def test_targets_and_loss(images: torch.Tensor, normalise: bool) -> None:
    torch.manual_seed(0)
    _, masked = split_patches_by_noise(torch.rand(3, 24), 0.75)
    expected = targets_by_loops(images.double().numpy(), masked.numpy(), normalise)
    found = build_reconstruction_targets(images, masked, PATCH, normalise)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6)

    pred = torch.randn_like(found)
    total, weight = reconstruction_loss(pred, found)
    by_loops = 0.0
    for image in range(3):
        for slot in range(masked.shape[1]):
            errors = [(float(p) - t) ** 2 for p, t in zip(pred[image, slot], expected[image, slot], strict=True)]
            by_loops += sum(errors) / len(errors)
    assert weight == 3 * masked.shape[1]
    assert total.item() == pytest.approx(by_loops, rel=1e-6)


def test_a_flat_patch_has_a_finite_target() -> None:
    flat = torch.full((1, 3, 16, 24), 0.7)
    assert build_reconstruction_targets(flat, torch.arange(24)[None], PATCH, norm_pix=True).abs().max() < 1e-3


def block_mask_by_loops(numbers: np.ndarray, rows: int, columns: int, side: int, keep: int) -> set[int]:
    """The places that stay visible in one image: the squares in the order of their numbers, patch by patch."""
    noise, (down, across) = numbers[:-2], (int(number * side) for number in numbers[-2:])
    wide = (columns + side - 2) // side + 1
    squares: dict[int, list[int]] = {}
    for row in range(rows):
        for column in range(columns):
            square = (row + down) // side * wide + (column + across) // side
            squares.setdefault(square, []).append(row * columns + column)
    order = [
        place
        for square in sorted(squares, key=lambda s: noise[s])
        for place in sorted(squares[square], key=lambda p: noise[p])
    ]
    return set(order[:keep])


def grid_mask_by_loops(numbers: np.ndarray, rows: int, columns: int, side: int) -> set[int]:
    down, across = (int(number * side) for number in numbers[-2:])
    return {row * columns + column for row in range(down, rows, side) for column in range(across, columns, side)}


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 6, 2), (12, 12, 3), (8, 16, 4)])
def test_masks_in_blocks_and_on_a_grid(rows: int, columns: int, side: int) -> None:
    numbers = torch.rand(20, rows * columns + 2, generator=torch.Generator().manual_seed(1))
    ratio = math.floor(1e4 * (1 - side**-2)) / 1e4
    in_blocks, _ = split_patches_by_noise(MASK_NOISE_FUNCTIONS["block"](numbers, rows, columns, side), 0.6)
    on_grid, _ = split_patches_by_noise(MASK_NOISE_FUNCTIONS["grid"](numbers, rows, columns, side), ratio)
    for image, row in enumerate(numbers.numpy()):
        assert set(in_blocks[image].tolist()) == block_mask_by_loops(row, rows, columns, side, in_blocks.shape[1])
        assert set(on_grid[image].tolist()) == grid_mask_by_loops(row, rows, columns, side)


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (8, 2)])
@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_patches_of_any_side(patch: int, size: tuple[int, int]) -> None:
    """From 2 to 32 pixels, in square grids and others: what is predicted is the pixels that the loops find."""
    torch.manual_seed(0)
    cfg = VitConfig(patch=patch, width=32, depth=1, heads=2)
    height, width = size[0] * patch, size[1] * patch
    encoder = build_encoder(cfg, image_size=(height, width), channels=1)
    model = MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1, heads=2))
    images, noise = torch.randn(2, 1, height, width), torch.rand(2, 16)
    pred, masked, *_ = model(images, noise, 0.75)
    assert pred.shape == (2, 12, patch * patch)
    by_loops = patches_by_loops(images.double().numpy(), patch)
    wanted = np.stack([by_loops[image, masked[image].numpy()] for image in range(2)])
    np.testing.assert_allclose(
        build_reconstruction_targets(images, masked, patch, norm_pix=False).numpy(), wanted, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_what_is_masked_cannot_be_seen(name: str, positions: Positions | None) -> None:
    model = autoencoder_of(name, positions)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    kept, masked = split_patches_by_noise(noise, 0.75)
    hidden = torch.zeros(2, 16, 3 * PATCH * PATCH).scatter(1, masked[:, :, None].expand(-1, -1, 3 * PATCH * PATCH), 1.0)
    vandalised = torch.where(unpatchify(hidden, PATCH, 4, 4) > 0, torch.nan, images)
    assert vandalised.isnan().sum() == 2 * 12 * 3 * PATCH * PATCH
    torch.testing.assert_close(model.encode(vandalised, kept), model.encode(images, kept), rtol=0, atol=0)
    torch.testing.assert_close(model(vandalised, noise, 0.75)[0], model(images, noise, 0.75)[0], rtol=0, atol=0)
