"""Random numbers: the published splitmix64, golden values, and equality of NumPy and torch."""

import numpy as np
import pytest
import torch

from foveal.seeding import (
    derive_key,
    draw_integer,
    draw_permutation,
    draw_uniform,
    draw_uniform_numpy,
    hash_ids,
    splitmix64,
)

GOLDEN_RATIO = 0x9E3779B97F4A7C15

# First outputs of the reference splitmix64.c (Vigna), for seeds 0 and 1234567.
REFERENCE = {
    0: [0xE220A8397B1DCDAF],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


@pytest.mark.parametrize("seed", REFERENCE)
def test_scramble_is_the_finaliser_of_splitmix64(seed: int) -> None:
    states = [(seed + GOLDEN_RATIO * turn) % 2**64 for turn in range(1, len(REFERENCE[seed]) + 1)]
    words = splitmix64(np.array(states, dtype=np.uint64).view(np.int64))
    assert words.view(np.uint64).tolist() == REFERENCE[seed]


def test_golden_keys() -> None:
    assert derive_key(0) == 8493733112532773764
    assert derive_key(7, 3, "mask") == -6480431070983398698
    assert derive_key(-1, "a", "b") == -8381630477388542509


def test_places_do_not_run_into_one_another() -> None:
    purposes = [(0, 1, "mask"), (0, "1", "mask2"), (0, 1, 2), (0, 12), (1, 2), (0, "augment", 1), (0, "augment1")]
    assert len({derive_key(*purpose) for purpose in purposes}) == len(purposes)


def test_golden_numbers() -> None:
    assert draw_permutation(derive_key(0, "p"), 10).tolist() == [2, 6, 9, 5, 0, 4, 3, 7, 1, 8]
    assert [draw_integer(derive_key(seed), 1000) for seed in range(5)] == [32, 39, 84, 970, 492]
    assert hash_ids(derive_key(0, "r"), np.arange(2)).tolist() == [6944603284052609519, 3834641539988212094]
    uniforms = draw_uniform_numpy(derive_key(0, "u"), np.array([0, 1, 2**40]), 3)
    assert uniforms.tolist() == [
        [0.376323401927948, 0.5574364066123962, 0.6479129791259766],
        [0.5318794846534729, 0.2161118984222412, 0.9800357222557068],
        [0.05078321695327759, 0.575593113899231, 0.25429296493530273],
    ]


def test_torch_and_numpy_draw_the_same() -> None:
    ids = np.array([0, 1, 2, 1796, 2**31, 2**40, -1])
    for key in (derive_key(0), derive_key(3, 1, "mask"), -(2**63), 2**63 - 1):
        uniforms = draw_uniform(key, torch.from_numpy(ids), 50)
        assert uniforms.dtype == torch.float32
        assert torch.equal(uniforms, torch.from_numpy(draw_uniform_numpy(key, ids, 50)))
        assert torch.equal(splitmix64(torch.from_numpy(ids)), torch.from_numpy(splitmix64(ids)))


def test_a_row_depends_on_its_sample_alone() -> None:
    ids = np.arange(64)
    all_rows = draw_uniform_numpy(derive_key(5), ids, 7)
    assert np.array_equal(draw_uniform_numpy(derive_key(5), ids[40:50], 7), all_rows[40:50])
    assert np.array_equal(draw_uniform_numpy(derive_key(5), ids, 3), all_rows[:, :3])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    uniforms = draw_uniform_numpy(derive_key(11, "u"), np.arange(4000), 8).astype(np.float64)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = np.bincount((uniforms * 64).astype(int).ravel(), minlength=64)
    chi = ((counts - 500.0) ** 2 / 500).sum()
    assert chi < 110  # 63 degrees of freedom: exceeded once in 5,000 sound generators
    between_columns = np.corrcoef(uniforms.T) - np.eye(8)
    between_rows = np.corrcoef(uniforms[:-1, 0], uniforms[1:, 0])[0, 1]
    assert np.abs(between_columns).max() < 0.08
    assert abs(between_rows) < 0.08


@pytest.mark.parametrize("length", [0, 1, 2, 1000])
def test_a_permutation_holds_everything_once(length: int) -> None:
    assert sorted(draw_permutation(derive_key(1, length), length).tolist()) == list(range(length))


def test_below_stays_below() -> None:
    assert {draw_integer(derive_key(0, turn), 3) for turn in range(50)} == {0, 1, 2}
    assert draw_integer(derive_key(0), 1) == 0
