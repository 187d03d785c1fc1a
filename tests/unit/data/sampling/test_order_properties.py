"""What holds for any shards, batch, lanes, window, seed, ranks and accumulation; the order against one written out."""

import time
from concurrent.futures import ThreadPoolExecutor
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
    """The arguments of an Order."""

    counts: np.ndarray
    batch: int
    lanes: int
    window: int
    seed: int
    mix: tuple[tuple[np.ndarray, float], ...] = ()

    def order(self) -> SampleOrder:
        return SampleOrder(self.counts, self.batch, self.lanes, self.window, self.seed, self.mix)

    def sources(self) -> list[tuple[np.ndarray, int]]:
        """Counts and seed of every source."""
        further = [
            (other, derive_key(self.seed, "source", number)) for number, (other, _) in enumerate(self.mix, start=1)
        ]
        return [(self.counts, self.seed), *further]


def filled(draw: st.DrawFn, least: int, shards: int) -> np.ndarray:
    """Samples of 1 to ``shards`` shards, 0 to 300 each, ``least`` in all."""
    number, most = draw(st.integers(1, shards)), draw(st.sampled_from((2, 30, 300)))
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(0, most)), min_size=number, max_size=number))
    counts[-1] += max(0, least - sum(counts))
    return np.array(counts)


@st.composite
def one_source(draw: st.DrawFn) -> Case:
    lanes = draw(st.integers(1, 12))
    batch = lanes * draw(st.integers(2, 40))
    counts = filled(draw, batch, 50)
    return Case(counts, batch, lanes, draw(st.integers(1, 8)), draw(st.integers(0, 2**40)))


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    lanes = draw(st.integers(1, 8))
    batch = lanes * draw(st.integers(4, 24))
    number = draw(st.integers(1, 3 if batch >= 18 else 1))
    shares = [draw(st.integers(1, 75 // number)) / 100 for _ in range(number)]
    counts = filled(draw, batch, 20)
    mix = tuple((filled(draw, lanes, 10), share) for share in shares if share)
    return Case(counts, batch, lanes, draw(st.integers(1, 5)), draw(st.integers(0, 2**40)), mix)


either = st.one_of(one_source(), mixtures())
quick = settings(max_examples=60, deadline=None)


def steps_of(order: SampleOrder, first: int, stop: int) -> tuple[np.ndarray, ...]:
    """Sources, positions, epochs and samples of whole steps, one after the other."""
    return tuple(np.concatenate(one) for one in zip(*(whole(order, step) for step in range(first, stop)), strict=True))


def whole(order: SampleOrder, step: int) -> tuple[np.ndarray, ...]:
    return astuple(order.assign_slots(step, 0, order.batch_size))


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def written_out(counts: np.ndarray, seed: int, lanes: int, usable: int, window: int, epoch: int) -> list[np.ndarray]:
    """The windows of every lane in turn, as lists of samples: the whole epoch in memory, as DESIGN says it."""
    ids = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1])
    line = np.concatenate([ids[shard] for shard in draw_permutation(derive_key(seed, epoch, "shards"), len(counts))])
    line = np.roll(line, -draw_integer(derive_key(seed, epoch, "rotate"), len(line)))[:usable]
    most = -(-window * int(counts.sum()) // len(counts))
    found = []
    for lane, stretch in enumerate(line.reshape(lanes, -1)):
        size = -(-len(stretch) // -(-len(stretch) // most))  # equal windows, none longer than the setting
        for block, start in enumerate(range(0, len(stretch), size)):
            part = stretch[start : start + size]
            found.append(part[draw_permutation(derive_key(seed, epoch, "window", lane, block), len(part))])
    return found


@given(either, st.integers(0, 40))
@quick
def test_the_order_is_the_one_written_out(case: Case, first: int) -> None:
    order = case.order()
    sources, positions, epochs, samples = steps_of(order, first, first + 3)
    for source, (counts, seed) in enumerate(case.sources()):
        mine = sources == source
        size = int(counts.sum())
        usable = size // case.lanes * case.lanes if case.mix else size // case.batch * case.batch
        assert same([positions[mine] // usable], [epochs[mine]])
        for epoch in np.unique(epochs[mine]):
            windows = written_out(counts, seed, case.lanes, usable, case.window, int(epoch))
            stream = np.concatenate(windows).reshape(case.lanes, -1).T.ravel()  # a step takes from lane after lane
            here = mine & (epochs == epoch)
            assert same([stream[positions[here] % usable]], [samples[here]])
    lanes = (positions % case.lanes).reshape(3, -1)
    assert (np.diff(lanes) >= 0).all()  # lane-major


@given(one_source())
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_no_sample_twice_and_drops_exactly_the_remainder(case: Case) -> None:
    order = case.order()
    for epoch in (0, 3):
        first = epoch * order.steps_per_epoch
        _, positions, epochs, seen = steps_of(order, first, first + order.steps_per_epoch)
        assert len(seen) == order.num_samples - order.dropped_per_epoch == order.epoch_quotas[0]
        assert order.dropped_per_epoch == order.num_samples % case.batch < case.batch
        assert np.bincount(seen, minlength=order.num_samples).max() == 1
        assert len(np.bincount(seen)) <= order.num_samples == case.counts.sum()
        assert set(epochs.tolist()) == {epoch} == {order.epoch_at_step(first + order.steps_per_epoch - 1)}
        assert same([np.sort(positions)], [np.arange(len(seen)) + epoch * len(seen)])


@given(one_source())
@settings(max_examples=25, deadline=None)
def test_other_samples_are_dropped_in_other_epochs(case: Case) -> None:
    order = case.order()
    assume(order.num_samples >= 50 and order.dropped_per_epoch)
    left_out = set()
    for epoch in range(4):  # four alike by chance: below 1e-5
        seen = steps_of(order, epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)[3]
        left_out.add(tuple(np.setdiff1d(np.arange(order.num_samples), seen)))
    assert len(left_out) > 1


@given(either, st.data())
@quick
def test_any_ranks_and_any_accumulation_see_the_same_batch(case: Case, data: st.DataObject) -> None:
    one = case.order()
    step = data.draw(st.integers(0, 3 * one.steps_per_epoch))
    for size in divisors(case.batch):
        at_once = data.draw(st.sampled_from(divisors(case.batch // size)))
        shares = []
        for rank in range(size):
            order = case.order() if rank % 4 == 0 else one  # ranks that know nothing of each other, and one that does
            start, stop = rank_slot_range(case.batch, case.lanes, rank, size)
            assert microbatches_per_step(case.batch, size, at_once) * at_once == stop - start
            shares += [
                astuple(order.assign_slots(step, micro, micro + at_once)) for micro in range(start, stop, at_once)
            ]
        assert same([np.concatenate(one) for one in zip(*shares, strict=True)], whole(one, step))


@given(either, st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 30))
@quick
def test_a_run_that_is_resumed_is_one_that_never_stopped(case: Case, skipped: list[int], stop: int) -> None:
    never = case.order()
    curve = [whole(never, batch_index_for_step(step, skipped)) for step in range(stop + 4)]
    resumed = case.order()
    for step in range(stop, stop + 4):
        assert same(whole(resumed, batch_index_for_step(step, skipped)), curve[step])


@given(st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 80))
@quick
def test_batches_that_are_skipped_are_passed_over_and_no_others(skipped: list[int], step: int) -> None:
    taken = [number for number in range(200) if number not in skipped]
    assert [batch_index_for_step(one, skipped) for one in range(80)] == taken[:80]
    found_bad = sorted({*skipped, batch_index_for_step(step, skipped)})
    assert [batch_index_for_step(one, found_bad) for one in range(step)] == taken[:step]  # what was trained on stays
    assert batch_index_for_step(step, found_bad) == batch_index_for_step(step + 1, skipped)


@given(mixtures(), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_an_epoch_of_a_mixture_has_exactly_the_quotas(case: Case, epoch: int) -> None:
    order = case.order()
    shares = [share for _, share in case.mix]
    steps = order.steps_per_epoch
    assert steps * case.batch * (1 - sum(shares)) <= order.num_samples * (1 + 1e-9)
    assert (steps + 1) * case.batch * (1 - sum(shares)) > order.num_samples * (1 - 1e-9)
    for quota, share in zip(order.epoch_quotas[1:], shares, strict=True):
        assert abs(quota - steps * case.batch * share) <= 0.5 + 1e-6
    sources, *_ = steps_of(order, epoch * steps, (epoch + 1) * steps)
    assert tuple(np.bincount(sources, minlength=len(shares) + 1)) == order.epoch_quotas
    for source, quota in enumerate(order.epoch_quotas[1:], start=1):  # spread evenly, not in one lump
        given_so_far = np.cumsum((sources == source).reshape(steps, case.batch).sum(axis=1))
        assert same([given_so_far], [np.arange(1, steps + 1) * quota // steps])


@given(mixtures())
@settings(max_examples=25, deadline=None)
def test_each_source_of_a_mixture_gives_each_sample_at_most_once_in_its_own_epoch(case: Case) -> None:
    order = case.order()
    sources, positions, epochs, samples = steps_of(order, 0, min(2 * order.steps_per_epoch, 60))
    for source, size in enumerate(order.source_sizes):
        mine = sources == source
        assert same([np.sort(positions[mine])], [np.arange(mine.sum())])  # nothing is passed over
        for epoch in range(int(epochs[mine].max(initial=-1)) + 1):
            seen = np.bincount(samples[mine & (epochs == epoch)], minlength=size)
            assert len(seen) == size
            assert seen.max() == 1
            if (epochs[mine] > epoch).any():
                assert seen.sum() == size - size % case.lanes


@given(either, st.data())
@quick
def test_what_replaces_a_sample_is_the_rest_of_its_window(case: Case, data: st.DataObject) -> None:
    order = case.order()
    sources, positions, epochs, samples = whole(order, data.draw(st.integers(0, 2 * order.steps_per_epoch)))
    slot = data.draw(st.integers(0, case.batch - 1))
    source, epoch, sample = int(sources[slot]), int(epochs[slot]), int(samples[slot])
    counts, seed = case.sources()[source]
    usable = int(counts.sum()) // case.lanes * case.lanes if case.mix else order.epoch_quotas[0]
    windows = written_out(counts, seed, case.lanes, usable, case.window, epoch)
    window = next(one.tolist() for one in windows if sample in one)
    at = window.index(sample)
    assert list(order.replacements(source, int(positions[slot]))) == window[at + 1 :] + window[:at]
    whole(order, order.steps_per_epoch * 5)  # what reads ahead has moved on meanwhile
    assert list(order.replacements(source, int(positions[slot]))) == window[at + 1 :] + window[:at]


@given(either, st.data())
@quick
def test_shards_are_those_of_the_current_windows_and_then_of_the_next(case: Case, data: st.DataObject) -> None:
    order = case.order()
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    size = data.draw(st.sampled_from(divisors(case.batch)))
    start, stop = rank_slot_range(case.batch, case.lanes, data.draw(st.integers(0, size - 1)), size)
    lanes = np.unique(order.assign_slots(step, start, stop).stream_positions % case.lanes)
    now, soon = set(), {}
    for source in range(len(case.sources())):
        for lane in lanes:
            current, following, steps = windows_read(case, step, source, int(lane))
            now |= {(source, shard) for shard in current}
            for shard in following:
                soon[source, shard] = min(steps, soon.get((source, shard), steps))
    named = order.upcoming_shards(step, start, stop)
    assert len(set(named)) == len(named)
    assert set(named[: len(now)]) == now
    assert set(named) == now | set(soon)
    assert (np.diff([soon[shard] for shard in named[len(now) :]]) >= 0).all()  # what is needed sooner comes first


def windows_read(case: Case, step: int, source: int, lane: int) -> tuple[set[int], set[int], float]:
    """The shards of the windows that a step reads of a lane, those of the window after, and how many steps that is off."""
    counts, seed = case.sources()[source]
    usable = int(counts.sum()) // case.lanes * case.lanes if case.mix else case.order().epoch_quotas[0]
    begin, end = (case.order()._samples_before(one)[source] for one in (step, step + 1))
    first = begin + (lane - begin) % case.lanes
    last = max([first, *range(first, end, case.lanes)])
    epochs = range(first // usable, last // usable + 2)
    windows = [window for epoch in epochs for window in of_lane(case, counts, seed, usable, epoch, lane)]
    ends = np.cumsum([len(one) for one in windows])
    offset = epochs[0] * usable // case.lanes
    low, high = np.searchsorted(ends, (first // case.lanes - offset, last // case.lanes - offset), side="right")
    next_position = (int(ends[high]) + offset) * case.lanes + lane
    current = shards_of(counts, np.concatenate(windows[low : high + 1]))
    return current, shards_of(counts, windows[high + 1]), (next_position - begin) / max(1, end - begin)


def of_lane(case: Case, counts: np.ndarray, seed: int, usable: int, epoch: int, lane: int) -> list[np.ndarray]:
    windows = written_out(counts, seed, case.lanes, usable, case.window, epoch)
    each = len(windows) // case.lanes
    return windows[lane * each : (lane + 1) * each]


def shards_of(counts: np.ndarray, samples: np.ndarray) -> set[int]:
    return set(np.searchsorted(np.cumsum(counts), samples, side="right").tolist())


class Slow(dict):
    """A dictionary that lets another thread on right after it took something in."""

    def __setitem__(self, name: object, value: object) -> None:
        super().__setitem__(name, value)
        time.sleep(1e-4)


def test_threads_that_share_an_order_do_not_disturb_it() -> None:
    case = Case(np.full(40, 3), 24, 4, 1, 3, mix=((np.full(30, 2), 0.3),))
    shared, steps = case.order(), range(0, 200, 2)
    for stream in shared._streams:
        stream._windows, stream._lines = Slow(), Slow()
    expected = [(whole(case.order(), step), case.order().upcoming_shards(step, 0, 24)) for step in steps]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: (whole(shared, step), shared.upcoming_shards(step, 0, 24)), steps))
    assert all(same(one[0], other[0]) and one[1] == other[1] for one, other in zip(found, expected, strict=True))
