"""Patches and masks: order, counts, ties."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.errors import ConfigError
from foveal.models.patches import count_visible, gather_patches, patchify, split_patches_by_noise, unpatchify


@pytest.mark.parametrize(("channels", "rows", "columns", "patch"), [(3, 2, 3, 4), (1, 4, 4, 2), (3, 1, 1, 5)])
def test_unpatchify_undoes_patchify(channels: int, rows: int, columns: int, patch: int) -> None:
    images = torch.rand(2, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (2, rows * columns, channels * patch * patch)
    assert torch.equal(unpatchify(patches, patch, rows, columns), images)


# (patches, ratio): the shipped configs, the paper's ratios at 224 pixels, and counts that floating point gets wrong.
COUNTS = {
    (196, 0.75): 49,
    (196, 0.9): 19,
    (196, 0.6): 78,
    (196, 0.5): 98,
    (256, 0.75): 64,
    (64, 0.75): 16,
    (64, 0.6): 25,
    (16, 0.75): 4,
    (16, 0.5): 8,
    (100, 0.9): 10,
    (10, 0.7): 3,
    (49, 0.0): 49,
}


@pytest.mark.parametrize(("length", "ratio"), COUNTS)
def test_how_many_stay_is_pinned(length: int, ratio: float) -> None:
    visible, masked = split_patches_by_noise(torch.rand(2, length), ratio)
    assert count_visible(length, ratio) == COUNTS[length, ratio]
    assert visible.shape == (2, COUNTS[length, ratio])
    assert masked.shape == (2, length - COUNTS[length, ratio])


@given(st.integers(1, 4096), st.integers(0, 1000))
def test_how_many_stay_is_what_real_numbers_say(length: int, thousandths: int) -> None:
    exact = length * (1 - Fraction(thousandths, 1000)) // 1
    if exact < 1:
        with pytest.raises(ConfigError):
            count_visible(length, thousandths / 1000)
    else:
        assert count_visible(length, thousandths / 1000) == exact


def test_how_many_stay_is_maes_number_for_ratios_of_three_decimals() -> None:
    """Of 196 patches. MAE's code computes int(L * (1 - ratio)) in floating point; fractions k / 196 may differ by one."""
    decimals = [thousandths / 1000 for thousandths in range(1, 995)]
    assert [ratio for ratio in decimals if count_visible(196, ratio) != int(196 * (1 - ratio))] == []
    differences = [count_visible(196, k / 196) - int(196 * (1 - k / 196)) for k in range(1, 196)]
    assert (differences.count(1), differences.count(0), differences[-1]) == (34, 161, 1)


def test_a_ratio_that_hides_everything_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"mask ratio 0.99 leaves none of 16 patches visible; at most 0.9375"):
        split_patches_by_noise(torch.rand(1, 16), 0.99)


def test_the_lowest_are_kept_in_order_of_their_noise() -> None:
    visible, masked = split_patches_by_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.1, 0.3]]), 0.5)
    assert visible.tolist() == [[1, 3], [2, 0]]
    assert masked.tolist() == [[2, 0], [3, 1]]


def test_equal_noise_goes_by_place() -> None:
    visible, masked = split_patches_by_noise(torch.zeros(1, 300), 0.75)
    assert torch.cat([visible, masked], dim=1).tolist() == [list(range(300))]


def test_every_patch_is_kept_or_masked_once() -> None:
    visible, masked = split_patches_by_noise(torch.rand(5, 196), 0.75)
    for row in torch.cat([visible, masked], dim=1).tolist():
        assert sorted(row) == list(range(196))


def test_noise_in_half_precision_is_refused() -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        split_patches_by_noise(torch.rand(1, 16, dtype=torch.bfloat16), 0.75)


def test_gather_patches() -> None:
    patches = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    indices = torch.tensor([[3, 0], [1, 1]])
    gathered = gather_patches(patches, indices)
    for image, slot in itertools.product(range(2), range(2)):
        assert torch.equal(gathered[image, slot], patches[image, indices[image, slot]])
