"""Mask strategies: number and places of visible patches, and refusals."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.errors import ConfigError
from foveal.models.config import MaskStrategy
from foveal.models.masks import MASK_NOISE_FUNCTIONS, NUM_OFFSET_DRAWS, resolve_mask_block_size
from foveal.models.patches import count_visible, split_patches_by_noise


def draw_uniforms(images: int, rows: int, columns: int) -> torch.Tensor:
    return torch.rand(images, rows * columns + NUM_OFFSET_DRAWS, generator=torch.Generator().manual_seed(0))


def visible_mask(
    masking: MaskStrategy, rows: int, columns: int, ratio: float, block: int = 2, images: int = 64
) -> torch.Tensor:
    """Return True where a patch is visible, [images, rows, columns]."""
    side = resolve_mask_block_size(masking, rows, columns, ratio, block)
    noise = MASK_NOISE_FUNCTIONS[masking](draw_uniforms(images, rows, columns), rows, columns, side)
    visible, masked = split_patches_by_noise(noise, ratio)
    indices = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert indices.equal(torch.arange(rows * columns).expand(images, -1))
    mask = torch.zeros(images, rows * columns, dtype=torch.bool).scatter(1, visible, value=True)
    return mask.view(images, rows, columns)


def test_at_random_the_numbers_are_the_noise() -> None:
    uniforms = draw_uniforms(3, 4, 6)
    assert MASK_NOISE_FUNCTIONS["random"](uniforms, 4, 6, 1).equal(uniforms[:, :24])


@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 20), st.floats(0.01, 0.99))
def test_blocks_show_exactly_as_many_as_random(rows: int, columns: int, block: int, ratio: float) -> None:
    if block > min(rows, columns) or rows * columns * (1 - ratio) < 1.01:
        return
    mask = visible_mask("block", rows, columns, ratio, block, images=4)
    assert mask.flatten(1).sum(dim=1).tolist() == [count_visible(rows * columns, ratio)] * 4


def test_all_blocks_but_one_are_whole() -> None:
    """For every mask there is an offset of the tiles at which at most one block is partly visible."""
    side = 3
    for mask in visible_mask("block", 9, 12, 0.6, side):
        partial_blocks = []
        for down in range(side):
            for across in range(side):
                tiles = torch.nn.functional.pad(mask.float(), (across, side, down, side), value=torch.nan)
                padded_blocks = [
                    tiles[top : top + side, left : left + side].flatten()
                    for top in range(0, 9 + side, side)
                    for left in range(0, 12 + side, side)
                ]
                blocks = [block[~block.isnan()] for block in padded_blocks]
                partial_blocks.append(sum(1 for block in blocks if len(block) and 0 < block.sum() < len(block)))
        assert min(partial_blocks) <= 1


def test_blocks_begin_anywhere_and_favour_no_patch() -> None:
    mask = visible_mask("block", 8, 8, 0.75, 4, images=4096).float()
    assert (mask.mean(dim=0) - 0.25).abs().max() < 0.06  # blocks that are cut off at the border are smaller


@pytest.mark.parametrize(("ratio", "side"), [(0.75, 2), (0.8888, 3), (0.9722, 6)])
def test_a_grid_shows_one_patch_of_each_cell(ratio: float, side: int) -> None:
    places = set()
    for mask in visible_mask("grid", 12, 18, ratio):
        cells = mask.view(12 // side, side, 18 // side, side).movedim(2, 1).flatten(0, 1)
        assert all(cell.equal(cells[0]) for cell in cells)
        assert cells[0].sum() == 1
        places.add(int(cells[0].flatten().long().argmax()))
    assert len(places) > side**2 / 2  # the place differs between images


@pytest.mark.parametrize("masking", MASK_NOISE_FUNCTIONS)
def test_a_row_is_masked_as_if_it_were_alone(masking: MaskStrategy) -> None:
    uniforms = draw_uniforms(5, 8, 8)
    batch_noise = MASK_NOISE_FUNCTIONS[masking](uniforms, 8, 8, 2)
    assert torch.cat([MASK_NOISE_FUNCTIONS[masking](row[None], 8, 8, 2) for row in uniforms]).equal(batch_noise)


@pytest.mark.parametrize(
    ("masking", "grid", "ratio", "block", "message"),
    [
        ("random", (4, 4), 0.99, 2, "mask ratio 0.99 leaves none of 16 patches visible"),
        ("block", (4, 6), 0.5, 5, "mask_block_size=5 is larger than an image of 4 x 6 patches; at most 4 fits"),
        (
            "grid",
            (14, 14),
            0.5,
            2,
            r"mask_ratio=0.5 is impossible with mask_strategy=grid.*nearest possible: 0.75 or 0.9795",
        ),
        ("grid", (14, 14), 0.8, 2, "nearest possible: 0.75 or 0.9795"),
        ("grid", (16, 16), 0.9, 2, "nearest possible: 0.9375 or 0.9843"),
        ("grid", (7, 9), 0.75, 2, "cannot divide 7 x 9 patches into equal square cells; use mask_strategy=random"),
    ],
)
def test_what_cannot_be_masked_is_one_sentence(
    masking: MaskStrategy, grid: tuple[int, int], ratio: float, block: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_mask_block_size(masking, *grid, ratio, block)


@pytest.mark.parametrize("length", [6, 14, 16, 28, 32, 60])
def test_the_ratios_that_are_named_are_accepted(length: int) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_mask_block_size("grid", length, length, 0.3, 2)
    for ratio in re.findall(r"0\.\d+", str(refused.value).rpartition(":")[2]):
        assert resolve_mask_block_size("grid", length, length, float(ratio), 2) >= 2
