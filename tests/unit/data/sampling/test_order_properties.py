"""Properties of the order for any shards, batch size, lanes, window, seed, world size and accumulation."""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foveal.data.sampling.order import (
    SampleOrder,
    batch_index_for_step,
    divisors,
    microbatches_per_step,
    rank_slot_range,
)
from foveal.seeding import derive_key, draw_integer, draw_permutation


@dataclass(frozen=True)
class Case:
    """Arguments of a ``SampleOrder``."""

    counts: np.ndarray
    batch: int
    lanes: int
    window: int
    seed: int
    mix: tuple[tuple[np.ndarray, float], ...] = ()

    def order(self) -> SampleOrder:
        return SampleOrder(self.counts, self.batch, self.lanes, self.window, self.seed, self.mix)

    def sources(self) -> list[tuple[np.ndarray, int]]:
        """Return the samples per shard and the seed of every source."""
        mixed = [
            (counts, derive_key(self.seed, "source", number)) for number, (counts, _) in enumerate(self.mix, start=1)
        ]
        return [(self.counts, self.seed), *mixed]


def draw_counts(draw: st.DrawFn, min_samples: int, max_shards: int) -> np.ndarray:
    """Draw the samples of 1 to ``max_shards`` shards, 0 to 300 each, at least ``min_samples`` in total."""
    number, limit = draw(st.integers(1, max_shards)), draw(st.sampled_from((2, 30, 300)))
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(0, limit)), min_size=number, max_size=number))
    counts[-1] += max(0, min_samples - sum(counts))
    return np.array(counts)


@st.composite
def one_source(draw: st.DrawFn) -> Case:
    lanes = draw(st.integers(1, 12))
    batch = lanes * draw(st.integers(2, 40))
    counts = draw_counts(draw, batch, 50)
    return Case(counts, batch, lanes, draw(st.integers(1, 8)), draw(st.integers(0, 2**40)))


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    lanes = draw(st.integers(1, 8))
    batch = lanes * draw(st.integers(4, 24))
    number = draw(st.integers(1, 3 if batch >= 18 else 1))
    shares = [draw(st.integers(1, 75 // number)) / 100 for _ in range(number)]
    counts = draw_counts(draw, batch, 20)
    mix = tuple((draw_counts(draw, lanes, 10), share) for share in shares if share)
    return Case(counts, batch, lanes, draw(st.integers(1, 5)), draw(st.integers(0, 2**40)), mix)


either = st.one_of(one_source(), mixtures())
quick = settings(max_examples=60)


def steps_of(order: SampleOrder, first: int, stop: int) -> tuple[np.ndarray, ...]:
    """Return sources, positions, epochs and samples of the steps [first, stop), concatenated."""
    steps = [all_slots(order, step) for step in range(first, stop)]
    return tuple(np.concatenate(arrays) for arrays in zip(*steps, strict=True))


def all_slots(order: SampleOrder, step: int) -> tuple[np.ndarray, ...]:
    return astuple(order.assign_slots(step, 0, order.batch_size))


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def reference_windows(
    counts: np.ndarray, seed: int, lanes: int, usable: int, window: int, epoch: int
) -> list[np.ndarray]:
    """Return the samples of every window, lane by lane: a reference implementation that holds a complete epoch."""
    ids = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1])
    line = np.concatenate([ids[shard] for shard in draw_permutation(derive_key(seed, epoch, "shards"), len(counts))])
    line = np.roll(line, -draw_integer(derive_key(seed, epoch, "rotate"), len(line)))[:usable]
    max_window = -(-window * int(counts.sum()) // len(counts))
    windows = []
    for lane, stretch in enumerate(line.reshape(lanes, -1)):
        size = -(-len(stretch) // -(-len(stretch) // max_window))  # equal windows, none longer than the setting
        for block, start in enumerate(range(0, len(stretch), size)):
            part = stretch[start : start + size]
            windows.append(part[draw_permutation(derive_key(seed, epoch, "window", lane, block), len(part))])
    return windows


@given(either, st.integers(0, 40))
@quick
def test_the_order_is_the_one_written_out(case: Case, first: int) -> None:
    order = case.order()
    sources, positions, epochs, samples = steps_of(order, first, first + 3)
    for source, (counts, seed) in enumerate(case.sources()):
        of_source = sources == source
        size = int(counts.sum())
        usable = size // case.lanes * case.lanes if case.mix else size // case.batch * case.batch
        assert same([positions[of_source] // usable], [epochs[of_source]])
        for epoch in np.unique(epochs[of_source]):
            windows = reference_windows(counts, seed, case.lanes, usable, case.window, int(epoch))
            stream = np.concatenate(windows).reshape(case.lanes, -1).T.ravel()  # a step takes samples lane by lane
            of_epoch = of_source & (epochs == epoch)
            assert same([stream[positions[of_epoch] % usable]], [samples[of_epoch]])
    lanes = (positions % case.lanes).reshape(3, -1)
    assert (np.diff(lanes) >= 0).all()  # lane-major


@given(one_source())
@settings(max_examples=25)
def test_an_epoch_has_no_sample_twice_and_drops_exactly_the_remainder(case: Case) -> None:
    order = case.order()
    for epoch in (0, 3):
        first = epoch * order.steps_per_epoch
        _, positions, epochs, samples = steps_of(order, first, first + order.steps_per_epoch)
        assert len(samples) == order.first_source_size - order.dropped_per_epoch == order.epoch_quotas[0]
        assert order.dropped_per_epoch == order.first_source_size % case.batch < case.batch
        assert np.bincount(samples, minlength=order.first_source_size).max() == 1
        assert len(np.bincount(samples)) <= order.first_source_size == case.counts.sum()
        assert set(epochs.tolist()) == {epoch} == {order.epoch_of_batch(first + order.steps_per_epoch - 1)}
        assert same([np.sort(positions)], [np.arange(len(samples)) + epoch * len(samples)])


@given(one_source())
@settings(max_examples=25)
def test_other_samples_are_dropped_in_other_epochs(case: Case) -> None:
    order = case.order()
    assume(order.first_source_size >= 50 and order.dropped_per_epoch)
    dropped = set()
    for epoch in range(4):  # probability of four equal sets by chance: below 1e-5
        samples = steps_of(order, epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)[3]
        dropped.add(tuple(np.setdiff1d(np.arange(order.first_source_size), samples)))
    assert len(dropped) > 1


@given(either, st.data())
@quick
def test_any_ranks_and_any_accumulation_see_the_same_batch(case: Case, data: st.DataObject) -> None:
    shared = case.order()
    step = data.draw(st.integers(0, 3 * shared.steps_per_epoch))
    for size in divisors(case.batch):
        at_once = data.draw(st.sampled_from(divisors(case.batch // size)))
        shares = []
        for rank in range(size):
            order = case.order() if rank % 4 == 0 else shared  # orders with and without earlier reads
            start, stop = rank_slot_range(case.batch, case.lanes, rank, size)
            assert microbatches_per_step(case.batch, size, at_once) * at_once == stop - start
            shares += [
                astuple(order.assign_slots(step, micro, micro + at_once)) for micro in range(start, stop, at_once)
            ]
        assert same([np.concatenate(arrays) for arrays in zip(*shares, strict=True)], all_slots(shared, step))


@given(either, st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 30))
@quick
def test_a_run_that_is_resumed_is_one_that_never_stopped(case: Case, skipped: list[int], stop: int) -> None:
    uninterrupted = case.order()
    batches = [all_slots(uninterrupted, batch_index_for_step(step, skipped)) for step in range(stop + 4)]
    resumed = case.order()
    for step in range(stop, stop + 4):
        assert same(all_slots(resumed, batch_index_for_step(step, skipped)), batches[step])


@given(st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 80))
@quick
def test_batches_that_are_skipped_are_passed_over_and_no_others(skipped: list[int], step: int) -> None:
    expected = [number for number in range(200) if number not in skipped]
    assert [batch_index_for_step(index, skipped) for index in range(80)] == expected[:80]
    extended = sorted({*skipped, batch_index_for_step(step, skipped)})
    assert [batch_index_for_step(index, extended) for index in range(step)] == expected[:step]  # earlier steps stay
    assert batch_index_for_step(step, extended) == batch_index_for_step(step + 1, skipped)


@given(mixtures(), st.integers(0, 3))
@settings(max_examples=25)
def test_an_epoch_of_a_mixture_has_exactly_the_quotas(case: Case, epoch: int) -> None:
    order = case.order()
    shares = [share for _, share in case.mix]
    steps = order.steps_per_epoch
    assert steps * case.batch * (1 - sum(shares)) <= order.first_source_size * (1 + 1e-9)
    assert (steps + 1) * case.batch * (1 - sum(shares)) > order.first_source_size * (1 - 1e-9)
    for quota, share in zip(order.epoch_quotas[1:], shares, strict=True):
        assert abs(quota - steps * case.batch * share) <= 0.5 + 1e-6
    sources, *_ = steps_of(order, epoch * steps, (epoch + 1) * steps)
    assert tuple(np.bincount(sources, minlength=len(shares) + 1)) == order.epoch_quotas
    for source, quota in enumerate(order.epoch_quotas[1:], start=1):  # spread evenly over the epoch
        cumulative = np.cumsum((sources == source).reshape(steps, case.batch).sum(axis=1))
        assert same([cumulative], [np.arange(1, steps + 1) * quota // steps])


@given(mixtures())
@settings(max_examples=25)
def test_each_source_of_a_mixture_gives_each_sample_at_most_once_in_its_own_epoch(case: Case) -> None:
    order = case.order()
    sources, positions, epochs, samples = steps_of(order, 0, min(2 * order.steps_per_epoch, 60))
    for source, size in enumerate(order.source_sizes):
        of_source = sources == source
        assert same([np.sort(positions[of_source])], [np.arange(of_source.sum())])  # no position is omitted
        for epoch in range(int(epochs[of_source].max(initial=-1)) + 1):
            counts = np.bincount(samples[of_source & (epochs == epoch)], minlength=size)
            assert len(counts) == size
            assert counts.max() == 1
            if (epochs[of_source] > epoch).any():
                assert counts.sum() == size - size % case.lanes


@given(either, st.data())
@quick
def test_what_replaces_a_sample_is_the_rest_of_its_window(case: Case, data: st.DataObject) -> None:
    order = case.order()
    sources, positions, epochs, samples = all_slots(order, data.draw(st.integers(0, 2 * order.steps_per_epoch)))
    slot = data.draw(st.integers(0, case.batch - 1))
    source, epoch, sample = int(sources[slot]), int(epochs[slot]), int(samples[slot])
    counts, seed = case.sources()[source]
    usable = int(counts.sum()) // case.lanes * case.lanes if case.mix else order.epoch_quotas[0]
    windows = reference_windows(counts, seed, case.lanes, usable, case.window, epoch)
    window = next(candidate.tolist() for candidate in windows if sample in candidate)
    at = window.index(sample)
    assert list(order.replacement_subset_positions(source, int(positions[slot]))) == window[at + 1 :] + window[:at]
    all_slots(order, order.steps_per_epoch * 5)  # the cached windows are later ones now
    assert list(order.replacement_subset_positions(source, int(positions[slot]))) == window[at + 1 :] + window[:at]


@given(either, st.data())
@quick
def test_shards_are_those_of_the_current_windows_and_then_of_the_next(case: Case, data: st.DataObject) -> None:
    order = case.order()
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    size = data.draw(st.sampled_from(divisors(case.batch)))
    start, stop = rank_slot_range(case.batch, case.lanes, data.draw(st.integers(0, size - 1)), size)
    lanes = np.unique(order.assign_slots(step, start, stop).stream_positions % case.lanes)
    current_shards, next_shards = set(), {}
    for source in range(len(case.sources())):
        for lane in lanes:
            current, following, steps = windows_read(case, step, source, int(lane))
            current_shards |= {(source, shard) for shard in current}
            for shard in following:
                next_shards[source, shard] = min(steps, next_shards.get((source, shard), steps))
    shards = order.upcoming_shards(step, start, stop)
    assert len(set(shards)) == len(shards)
    count = len(current_shards)
    assert set(shards[:count]) == current_shards
    assert set(shards) == current_shards | set(next_shards)
    assert (np.diff([next_shards[shard] for shard in shards[count:]]) >= 0).all()  # in the order of first use


def windows_read(case: Case, step: int, source: int, lane: int) -> tuple[set[int], set[int], float]:
    """Return the shards that a step reads in a lane, the shards of the next window, and the steps until that window."""
    counts, seed = case.sources()[source]
    usable = int(counts.sum()) // case.lanes * case.lanes if case.mix else case.order().epoch_quotas[0]
    begin, end = (case.order()._samples_before(boundary)[source] for boundary in (step, step + 1))
    first = begin + (lane - begin) % case.lanes
    last = max([first, *range(first, end, case.lanes)])
    epochs = range(first // usable, last // usable + 2)
    windows = [window for epoch in epochs for window in of_lane(case, counts, seed, usable, epoch, lane)]
    ends = np.cumsum([len(window) for window in windows])
    offset = epochs[0] * usable // case.lanes
    low, high = np.searchsorted(ends, (first // case.lanes - offset, last // case.lanes - offset), side="right")
    next_position = (int(ends[high]) + offset) * case.lanes + lane
    current = shards_of(counts, np.concatenate(windows[low : high + 1]))
    return current, shards_of(counts, windows[high + 1]), (next_position - begin) / max(1, end - begin)


def of_lane(case: Case, counts: np.ndarray, seed: int, usable: int, epoch: int, lane: int) -> list[np.ndarray]:
    windows = reference_windows(counts, seed, case.lanes, usable, case.window, epoch)
    windows_per_lane = len(windows) // case.lanes
    return windows[lane * windows_per_lane : (lane + 1) * windows_per_lane]


def shards_of(counts: np.ndarray, samples: np.ndarray) -> set[int]:
    return set(np.searchsorted(np.cumsum(counts), samples, side="right").tolist())
