"""DeepSpeed's buckets come from the model, and a user's keys rule."""

from typing import Any

import pytest

from foveal.engines.buckets import derive_zero_options

MILLION = 10**6


@pytest.mark.parametrize(
    ("numels", "size"),
    [
        pytest.param([2_359_296] * 48, 28_311_552, id="ViT-B: a quarter"),
        pytest.param([4 * MILLION] * 82, 50 * MILLION, id="ViT-L: the ceiling"),
        pytest.param([1_000] * 10, MILLION, id="tiny: the floor"),
        pytest.param([60 * MILLION, MILLION], 60 * MILLION, id="the largest parameter"),
        pytest.param([1_500_001, 500_000], 1_500_001, id="above the floor"),
        pytest.param([], MILLION, id="before a model is built"),
    ],
)
def test_a_bucket_is_a_quarter_of_the_model_within_limits(numels: list[int], size: int) -> None:
    for zero in (1, 2, 3):
        assert derive_zero_options(zero, numels, 2, {}) == {"reduce_bucket_size": size, "overlap_comm": True}


def test_one_rank_has_nothing_to_overlap_and_copies_no_gradient() -> None:
    for zero, copies in ((1, {"contiguous_gradients": False}), (2, {"contiguous_gradients": False}), (3, {})):
        expected: dict[str, Any] = {"reduce_bucket_size": MILLION, "overlap_comm": False}
        assert derive_zero_options(zero, [MILLION], 1, {}) == expected | copies


def test_zero_0_takes_no_options() -> None:
    assert derive_zero_options(0, [MILLION], 2, {"sub_group_size": 3}) == {"sub_group_size": 3}


@pytest.mark.parametrize(
    ("keys", "follows"),
    [
        ({"overlap_comm": False}, {"contiguous_gradients": False}),
        ({"overlap_comm": False, "contiguous_gradients": True}, {}),
        ({"reduce_bucket_size": 7}, {}),
        ({"sub_group_size": 3}, {}),
    ],
)
def test_a_users_keys_rule(keys: dict[str, Any], follows: dict[str, Any]) -> None:
    derived: dict[str, Any] = {"reduce_bucket_size": MILLION, "overlap_comm": True}
    assert derive_zero_options(2, [MILLION], 2, keys) == derived | follows | keys


def test_overlap_is_deepspeeds_own_where_the_update_is_on_the_host() -> None:
    keys = {"offload_optimizer": {"device": "cpu"}}
    assert derive_zero_options(2, [MILLION], 2, keys) == {"reduce_bucket_size": MILLION} | keys
