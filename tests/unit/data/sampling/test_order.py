"""Sample order: golden values, memory, and errors for invalid lanes, batches and shares."""

import itertools

import numpy as np
import pytest

from foveal.data.sampling.order import SampleOrder, check_lanes, microbatches_per_step, rank_slot_range
from foveal.errors import ConfigError, DataError


def epoch_of_samples(order: SampleOrder, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.concatenate(
        [
            order.assign_slots(first + index, 0, order.batch_size).subset_positions
            for index in range(order.steps_per_epoch)
        ]
    )


GOLDEN = (
    [7, 0, 5, 6, 15, 19, 18, 16],
    [8, 14, 1, 13, 2, 4, 3, 17],
    [15, 18, 7, 17, 0, 11, 1, 9],
    [16, 14, 19, 0],
)
MIXED = (
    [0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 1, 1, 2],
    [30, 32, 34, 36, 38, 12, 14, 6, 31, 33, 35, 37, 39, 13, 15, 7],
    [1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 3],
    [17, 6, 16, 19, 8, 8, 6, 0, 10, 12, 9, 4, 5, 3, 1, 1],
)
MANY = ([1036176, 946146, 959688, 377114], [1086879, 1046278, 116575, 1087416])


def test_golden() -> None:
    order = SampleOrder(np.array([5, 4, 6, 5]), batch_size=8, num_lanes=2, window_shards=2, seed=7)
    assert (order.first_source_size, order.steps_per_epoch, order.dropped_per_epoch) == (20, 2, 4)
    assert order.assign_slots(0, 0, 8).subset_positions.tolist() == GOLDEN[0]
    assert order.assign_slots(1, 0, 8).subset_positions.tolist() == GOLDEN[1]
    assert order.assign_slots(2, 0, 8).subset_positions.tolist() == GOLDEN[2]
    assert order.assign_slots(1_000_000_001, 2, 6).subset_positions.tolist() == GOLDEN[3]


def test_golden_of_many_shards() -> None:
    order = SampleOrder(np.full(1000, 1281), batch_size=4096, num_lanes=32, window_shards=4, seed=0)
    assert order.assign_slots(0, 0, 4).subset_positions.tolist() == MANY[0]
    assert order.assign_slots(123_456, 4092, 4096).subset_positions.tolist() == MANY[1]


def test_golden_of_a_mixture() -> None:
    mix = [(np.array([4, 0, 5]), 0.25), (np.array([3]), 0.125)]
    order = SampleOrder(np.array([5, 4, 6, 5]), batch_size=16, num_lanes=2, window_shards=2, seed=7, mix=mix)
    assert (order.source_sizes, order.first_source_size, order.steps_per_epoch, order.dropped_per_epoch) == (
        (20, 9, 3),
        20,
        2,
        0,
    )
    assert order.epoch_quotas == (20, 8, 4)
    assert order.epoch_of_batch(3) == 1
    slots = order.assign_slots(3, 0, 16)
    assert slots.source_numbers.tolist() == MIXED[0]
    assert slots.stream_positions.tolist() == MIXED[1]
    assert slots.source_epochs.tolist() == MIXED[2]
    assert slots.subset_positions.tolist() == MIXED[3]


def test_a_mixture_does_not_move_what_a_source_of_its_own_would_give() -> None:
    """Source 0 keeps its seed: mixing changes the step of a sample, not which samples share a window."""
    single = SampleOrder(np.full(6, 40), batch_size=24, num_lanes=4, window_shards=2, seed=5)
    mixed = SampleOrder(
        np.full(6, 40), batch_size=24, num_lanes=4, window_shards=2, seed=5, mix=[(np.full(6, 40), 0.5)]
    )
    slots = mixed.assign_slots(0, 0, 24)
    first, second = (slots.subset_positions[slots.source_numbers == source].tolist() for source in (0, 1))
    assert set(first) <= set(single.assign_slots(0, 0, 24).subset_positions.tolist())
    assert first != second  # two sources of the same shards have different orders


def test_the_next_shards_are_named_by_when_they_are_needed() -> None:
    counts = np.full(100, 10)
    # Source 1 has as many samples as source 0 and is read four times as fast.
    order = SampleOrder(counts, batch_size=20, num_lanes=2, window_shards=2, seed=0, mix=[(counts, 0.8)])
    runs = [source for source, _ in itertools.groupby(source for source, _ in order.upcoming_shards(0, 0, 20))]
    assert runs == [0, 1, 0, 1, 0]  # of this step, lane by lane; then the next windows of source 1 before those of 0


def test_epochs_differ_and_so_does_what_they_drop() -> None:
    order = SampleOrder(np.full(10, 13), batch_size=24, num_lanes=4, window_shards=2, seed=1)
    all_samples = set(range(130))
    dropped = [all_samples - set(epoch_of_samples(order, epoch).tolist()) for epoch in range(6)]
    assert all(len(samples) == 10 for samples in dropped)
    assert len({frozenset(samples) for samples in dropped}) == 6
    assert epoch_of_samples(order, 0).tolist() != epoch_of_samples(order, 1).tolist()
    assert order.epoch_of_batch(4) == 0
    assert order.epoch_of_batch(5) == 1


def test_another_seed_is_another_order() -> None:
    orders = [SampleOrder(np.full(10, 13), 24, 4, 2, seed) for seed in (1, 2)]
    first, second = (order.assign_slots(0, 0, 24).subset_positions.tolist() for order in orders)
    assert first != second


def test_a_lane_reads_within_its_window() -> None:
    """A lane reads the shards of its window and the two at the window's borders, not the complete data set."""
    counts = np.full(64, 100)
    order = SampleOrder(counts, batch_size=80, num_lanes=4, window_shards=4, seed=3)
    for step in range(order.steps_per_epoch):
        samples = order.assign_slots(step, 0, 20).subset_positions  # lane 0
        assert len(np.unique(samples // 100)) <= 6


def test_memory_is_that_of_the_lanes_touched() -> None:
    """200,000 shards of 10,000 samples: a permutation of 2 billion samples would need 16 GB."""
    order = SampleOrder(np.full(200_000, 10_000), batch_size=4096, num_lanes=32, window_shards=4, seed=0)
    samples = order.assign_slots(250_000, 0, 128).subset_positions
    assert len(np.unique(samples)) == 128
    window_bytes = sum(samples.nbytes for _, samples in order._streams[0]._windows.values())
    assert window_bytes == 39_988 * 8  # at most 40,000 samples: a lane has windows of equal length
    for epoch in range(5):
        order.assign_slots(epoch * order.steps_per_epoch, 0, 1)
    assert set(order._streams[0]._lines) == {3, 4}  # the arrays of an epoch have one entry per shard


def test_a_batch_of_one_image_has_one_lane() -> None:
    order = SampleOrder(np.array([3]), batch_size=1, num_lanes=1, window_shards=4, seed=0)
    assert sorted(epoch_of_samples(order, 0).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("batch", "lanes", "nearest"), [(48, 32, 24), (64, 33, 32), (64, 64, 32), (7, 32, 1), (2, 2, 1)]
)
def test_lanes_that_do_not_fit_name_the_nearest_that_do(batch: int, lanes: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"data.lanes={lanes} .* batch of {batch} .* is data.lanes={nearest}$"):
        check_lanes(batch, lanes)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"a batch of 64 images cannot be filled from 50 samples: lower batch.global_size to 50"
    ):
        SampleOrder(np.array([20, 30]), batch_size=64, num_lanes=8, window_shards=4, seed=0)


@pytest.mark.parametrize(
    ("sizes", "batch", "share", "sentence"),
    [
        ((100, 3), 16, 0.5, r"^data.mix\[0\] has 3 samples for 4 lanes: lower data.lanes"),
        ((3, 100), 16, 0.9, r"^data.path has 3 samples for 4 lanes: lower data.lanes"),
        ((100, 0), 16, 0.5, r"^data.mix\[0\] has 0 samples for 4 lanes"),
        (
            (7, 100),
            16,
            0.5,
            r"^data.path has 7 samples, and its share of a batch of 16 images is 8: lower batch.global_size",
        ),
    ],
)
def test_sources_that_cannot_fill_a_mixture_are_refused(
    sizes: tuple[int, int], batch: int, share: float, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        SampleOrder(np.array([sizes[0]]), batch, 4, 4, 0, [(np.array([sizes[1]]), share)])


@pytest.mark.parametrize(("batch", "shares"), [(4, (0.3, 0.3, 0.3)), (5, (0.31, 0.31, 0.31)), (2, (0.01,) * 3)])
def test_a_batch_too_small_for_its_shares_names_one_that_is_not(batch: int, shares: tuple[float, ...]) -> None:
    mix = [(np.array([5000]), share) for share in shares]
    with pytest.raises(
        ConfigError, match=rf"a batch of {batch} images is too small for the shares .* or more"
    ) as caught:
        SampleOrder(np.array([5000]), batch, 1, 4, 0, mix)
    suggested = int(str(caught.value).split("raise batch.global_size to ")[1].split()[0])
    assert min(SampleOrder(np.array([5000]), suggested, 1, 4, 0, mix).epoch_quotas) > 0


def test_ranks_that_do_not_divide_the_batch_name_what_would() -> None:
    with pytest.raises(ConfigError, match=r"4096 images .* 24 ranks .* is 4128 .* number of ranks is 16 or 32$"):
        rank_slot_range(4096, 32, 0, 24)


@pytest.mark.parametrize(("batch", "lanes", "size"), [(4096, 32, 24), (10, 5, 7), (6, 3, 4), (2, 1, 3), (100, 50, 150)])
def test_the_batch_that_is_named_fits(batch: int, lanes: int, size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_slot_range(batch, lanes, 0, size)
    suggested = int(str(caught.value).split("that fits is ")[1].split()[0])
    check_lanes(suggested, lanes)
    assert rank_slot_range(suggested, lanes, size - 1, size)[1] == suggested


def test_images_at_once_that_do_not_divide_name_what_would() -> None:
    assert microbatches_per_step(4096, 8, 64) == 8
    with pytest.raises(
        ConfigError, match=r"batch.max_micro_size=48 does not divide the 512 images .*: use 32 or 64; it does not"
    ):
        microbatches_per_step(4096, 8, 48)
    with pytest.raises(ConfigError, match=r"batch.max_micro_size=1024 .*: use 512;"):
        microbatches_per_step(4096, 8, 1024)
