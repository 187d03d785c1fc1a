"""The order of samples: golden values, and what holds for any counts, batch, lanes, window and number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.data.order import Order, check_lanes, divisors, micros_per_step, rank_slots
from foveal.errors import ConfigError, DataError


def epoch_of_samples(order: Order, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.slots(first + turn, 0, order.batch) for turn in range(order.steps_per_epoch)])


@st.composite
def orders(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int]:
    lanes = draw(st.integers(1, 6))
    batch = lanes * draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    short = batch - sum(counts)
    if short > 0:
        counts.append(short)
    return np.array(counts), batch, lanes, draw(st.integers(1, 5)), draw(st.integers(0, 2**40))


GOLDEN = (
    [7, 0, 5, 6, 15, 19, 18, 16],
    [8, 14, 1, 13, 2, 4, 3, 17],
    [15, 18, 7, 17, 0, 11, 1, 9],
    [16, 14, 19, 0],
)
MANY = ([1036176, 946146, 959688, 377114], [1045462, 116670, 117262, 1086799])


def test_golden() -> None:
    order = Order(np.array([5, 4, 6, 5]), batch=8, lanes=2, window=2, seed=7)
    assert (order.samples, order.steps_per_epoch, order.dropped) == (20, 2, 4)
    assert order.slots(0, 0, 8).tolist() == GOLDEN[0]
    assert order.slots(1, 0, 8).tolist() == GOLDEN[1]
    assert order.slots(2, 0, 8).tolist() == GOLDEN[2]
    assert order.slots(1_000_000_001, 2, 6).tolist() == GOLDEN[3]


def test_golden_of_many_shards() -> None:
    order = Order(np.full(1000, 1281), batch=4096, lanes=32, window=4, seed=0)
    assert order.slots(0, 0, 4).tolist() == MANY[0]
    assert order.slots(123_456, 4092, 4096).tolist() == MANY[1]


@given(orders())
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_no_sample_twice_and_drops_exactly_the_remainder(parts: tuple) -> None:
    order = Order(*parts)
    for epoch in (0, 3):
        seen = epoch_of_samples(order, epoch)
        assert len(seen) == order.samples - order.samples % order.batch == order.samples - order.dropped
        assert len(np.unique(seen)) == len(seen)
        assert seen.min() >= 0
        assert seen.max() < order.samples


@given(orders(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_ranks_that_divide_the_batch_see_the_same_batch(parts: tuple, data: st.DataObject) -> None:
    whole = Order(*parts)
    size = data.draw(st.sampled_from(divisors(whole.batch)))
    step = data.draw(st.integers(0, 3 * whole.steps_per_epoch))
    shares = []
    for rank in range(size):
        start, stop = rank_slots(whole.batch, whole.lanes, rank, size)
        shares.append(Order(*parts).slots(step, start, stop))
    assert np.concatenate(shares).tolist() == whole.slots(step, 0, whole.batch).tolist()


@given(orders(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_step_does_not_depend_on_what_was_asked_before(parts: tuple, step: int) -> None:
    warm = Order(*parts)
    for before in range(max(0, step - 3), step):
        warm.slots(before, 0, warm.batch)
    assert warm.slots(step, 0, warm.batch).tolist() == Order(*parts).slots(step, 0, warm.batch).tolist()


def test_epochs_differ_and_so_does_what_they_drop() -> None:
    order = Order(np.full(10, 13), batch=24, lanes=4, window=2, seed=1)
    everything = set(range(130))
    dropped = [everything - set(epoch_of_samples(order, epoch).tolist()) for epoch in range(6)]
    assert all(len(one) == 10 for one in dropped)
    assert len({frozenset(one) for one in dropped}) == 6
    assert epoch_of_samples(order, 0).tolist() != epoch_of_samples(order, 1).tolist()
    assert order.epoch_of(4) == 0
    assert order.epoch_of(5) == 1


def test_another_seed_is_another_order() -> None:
    one, other = (Order(np.full(10, 13), 24, 4, 2, seed) for seed in (1, 2))
    assert one.slots(0, 0, 24).tolist() != other.slots(0, 0, 24).tolist()


def test_a_lane_reads_within_its_window() -> None:
    """Shards open at once per lane: the window and the two it may begin and end in, not the whole set."""
    counts = np.full(64, 100)
    order = Order(counts, batch=80, lanes=4, window=4, seed=3)
    for step in range(order.steps_per_epoch):
        samples = order.slots(step, 0, 20)  # lane 0
        assert len(np.unique(samples // 100)) <= 6


def test_memory_is_that_of_the_lanes_touched() -> None:
    """200,000 shards of 10,000 samples: 2 billion would need 16 GB as one permutation."""
    order = Order(np.full(200_000, 10_000), batch=4096, lanes=32, window=4, seed=0)
    samples = order.slots(250_000, 0, 128)
    assert len(np.unique(samples)) == 128
    assert sum(block.nbytes for _, _, block in order._blocks.values()) == 40_000 * 8


def test_a_batch_of_one_image_has_one_lane() -> None:
    order = Order(np.array([3]), batch=1, lanes=1, window=4, seed=0)
    assert sorted(epoch_of_samples(order, 0).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("batch", "lanes", "nearest"), [(48, 32, 24), (64, 33, 32), (64, 64, 32), (7, 32, 1), (2, 2, 1)]
)
def test_lanes_that_do_not_fit_name_the_nearest_that_do(batch: int, lanes: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"data.lanes={lanes} .* batch of {batch} .* is data.lanes={nearest}$"):
        check_lanes(batch, lanes)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"a batch of 64 images cannot be filled from 50 samples: lower batch.images to 50"
    ):
        Order(np.array([20, 30]), batch=64, lanes=8, window=4, seed=0)


def test_ranks_that_do_not_divide_the_batch_name_what_would() -> None:
    with pytest.raises(ConfigError, match=r"4096 images .* 24 ranks .* is 4128 .* numbers of ranks are 16 or 32$"):
        rank_slots(4096, 32, 0, 24)


@pytest.mark.parametrize(("batch", "lanes", "size"), [(4096, 32, 24), (10, 5, 7), (6, 3, 4), (2, 1, 3), (100, 50, 150)])
def test_the_batch_that_is_named_fits(batch: int, lanes: int, size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_slots(batch, lanes, 0, size)
    named = int(str(caught.value).split("that fits is ")[1].split()[0])
    check_lanes(named, lanes)
    assert rank_slots(named, lanes, size - 1, size)[1] == named


def test_images_at_once_that_do_not_divide_name_what_would() -> None:
    assert micros_per_step(4096, 8, 64) == 8
    with pytest.raises(
        ConfigError, match=r"batch.at_once=48 does not divide the 512 images .*: use 32 or 64; it does not"
    ):
        micros_per_step(4096, 8, 48)
    with pytest.raises(ConfigError, match=r"batch.at_once=1024 .*: use 512;"):
        micros_per_step(4096, 8, 1024)
