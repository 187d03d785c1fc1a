"""Lanes that are not stated, and the batch that a refusal names."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.data.sampling.lanes import (
    check_lanes,
    check_set_fills_batch,
    derive_lanes,
    explain_lanes,
    suggest_batch_size,
)
from foveal.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=3)


def fits(lanes: int, batch: int, sizes: list[int]) -> bool:
    """Whether the order accepts these lanes."""
    try:
        check_lanes(batch, lanes)
    except ConfigError:
        return False
    return len(sizes) == 1 or lanes <= min(sizes)


@settings(max_examples=60)
@given(batch=st.integers(1, 4096), sizes=SIZES)
def test_lanes_are_32_wherever_32_fits_and_else_the_largest_smaller_number(batch: int, sizes: list[int]) -> None:
    lanes = derive_lanes(batch, sizes)
    assert lanes == max(number for number in range(1, 33) if fits(number, batch, sizes))
    assert bool(explain_lanes(lanes, batch, sizes)) == (lanes != 32)


def test_other_lanes_than_32_have_a_reason() -> None:
    assert derive_lanes(100, [1437]) == 25
    assert "lanes divide the batch of 100, with 2 images or more in each)" in explain_lanes(25, 100, [1437])
    assert derive_lanes(256, [1437, 20]) == 16
    assert "in each, and the smallest set has 20 images)" in explain_lanes(16, 256, [1437, 20])
    assert explain_lanes(8, 256, [1437]) == " (data.lanes)"


@settings(max_examples=60)
@given(samples=st.integers(1, 500), ranks=st.integers(1, 64), lanes=st.none() | st.sampled_from([3, 8, 10, 32]))
def test_the_batch_that_is_named_fits_set_ranks_and_lanes(samples: int, ranks: int, lanes: int | None) -> None:
    batch = suggest_batch_size(samples, ranks, lanes)
    if batch is None:
        assert not any(lanes is None or fits(lanes, size, [samples]) for size in range(ranks, samples + 1, ranks))
        return
    assert batch <= samples and batch % ranks == 0
    assert lanes is None or fits(lanes, batch, [samples])


@pytest.mark.parametrize(
    ("samples", "fraction", "lanes", "ranks", "sentence"),
    [
        (1437, Fraction(1), None, 8, "cannot be filled from 1437 samples: set batch.global_size=256, which 8 ranks divide"),
        (90, Fraction(1), None, 1, "set batch.global_size=16, or give more data"),
        (30, Fraction(1), 32, 1, "set batch.global_size=4 and data.lanes=null, or give more data"),
        (90, Fraction(1, 2), None, 1, "its share, 1024, of a batch of 2048 images .*: set batch.global_size=32"),
        (7, Fraction(1), None, 8, "and not one for each of 8 ranks: use fewer ranks"),
    ],
)  # fmt: skip
def test_a_set_smaller_than_a_batch_names_one_that_it_fills(
    samples: int, fraction: Fraction, lanes: int | None, ranks: int, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        check_set_fills_batch(samples, 2048, fraction, lanes, ranks)
    if named := re.search(r"global_size=(\d+)", str(caught.value)):
        check_set_fills_batch(samples, int(named[1]), fraction, None, ranks)
