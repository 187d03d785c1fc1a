"""Assignment of samples to the slots of every step: a pure function of (seed, epoch), without I/O.

Every epoch of a source concatenates its shards in a new order, rotates this sequence and splits it into equal lanes.
Each lane shuffles within windows, and a step takes the next samples of every lane, lane by lane. The order does not
depend on the world size: rank r of R takes a contiguous range of slots, so every R that divides the batch size sees the
same global batch. Several sources are mixed by quotas, with the number of samples before a step in closed form.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from foveal.data.sampling.lanes import check_lanes, divisors
from foveal.errors import ConfigError, DataError
from foveal.seeding import derive_key, draw_integer, draw_permutation


@dataclass(frozen=True)
class SampleSlots:
    """Samples of n slots of one step, in slot order; all fields int64 [n].

    source_numbers: 0 is data.path, k is data.mix[k - 1]. stream_positions: position in the source's endless stream.
    epochs: epoch of the source, which differs from the mixture's. subset_positions: position in the source's subset,
    0..N_k-1, in the order of the shards as given.
    """

    source_numbers: np.ndarray
    stream_positions: np.ndarray
    source_epochs: np.ndarray
    subset_positions: np.ndarray


class SampleOrder:
    """Order of all epochs of one source or of a mixture of sources. It pickles; threads do not share it.

    samples_per_shard: of source 0, int64 [S]. batch_size: images per step over all ranks. num_lanes: streams per epoch.
    window_shards: shards that a lane shuffles over. mix: samples per shard and share of the batch of every further
    source.
    first_source_size: samples of source 0. source_sizes: samples of every source. epoch_quotas: exact number of samples of
    every source in an epoch. dropped_per_epoch: samples of source 0 that an epoch omits, a different set each time.
    An epoch of a mixture is one pass over source 0; the other sources have epochs of their own length.
    Memory: O(S) and one window per lane in use, never O(N).
    Raises: ConfigError if the lanes do not fit the batch or the batch is too small for the shares; DataError if
    source 0 has fewer samples than its share of one batch, or any source has fewer samples than lanes.
    """

    def __init__(
        self,
        samples_per_shard: np.ndarray,
        batch_size: int,
        num_lanes: int,
        window_shards: int,
        seed: int,
        mix: Sequence[tuple[np.ndarray, float]] = (),
    ) -> None:
        check_lanes(batch_size, num_lanes)
        self.batch_size, self.num_lanes = batch_size, num_lanes
        self.source_sizes = (int(samples_per_shard.sum()), *(int(counts.sum()) for counts, _ in mix))
        self.first_source_size = self.source_sizes[0]
        self.steps_per_epoch, self.epoch_quotas = _compute_quotas(
            self.source_sizes, batch_size, num_lanes, [share for _, share in mix]
        )
        usable = self.steps_per_epoch * batch_size if not mix else self.first_source_size // num_lanes * num_lanes
        self.dropped_per_epoch = self.first_source_size - usable
        self._streams = [_SourceStream(samples_per_shard, num_lanes, usable // num_lanes, window_shards, seed)]
        for number, (counts, _) in enumerate(mix, start=1):
            lane_length = self.source_sizes[number] // num_lanes
            source_seed = derive_key(seed, "source", number)
            self._streams.append(_SourceStream(counts, num_lanes, lane_length, window_shards, source_seed))

    def epoch_of_batch(self, batch_index: int) -> int:
        """Return the epoch of a global step, from 0; for several sources, the epoch of the mixture."""
        return batch_index // self.steps_per_epoch

    def assign_slots(self, batch_index: int, start_slot: int, stop_slot: int) -> SampleSlots:
        """Return the samples of slots [start_slot, stop_slot) of a global step.

        Slots are ordered by lane, so that a range of slots touches few lanes.
        """
        sources, positions = self._deal_slots(batch_index, start_slot, stop_slot)
        slots = SampleSlots(sources, positions, np.empty_like(positions), np.empty_like(positions))
        lanes = positions % self.num_lanes
        edges = np.flatnonzero((np.diff(lanes) != 0) | (np.diff(sources) != 0)) + 1
        for run in np.split(np.arange(stop_slot - start_slot), edges) if stop_slot > start_slot else ():
            stream = self._streams[sources[run[0]]]
            slots.source_epochs[run], slots.subset_positions[run] = stream.samples_at(
                int(lanes[run[0]]), positions[run]
            )
        return slots

    def replacement_subset_positions(self, source_number: int, stream_position: int) -> Iterator[int]:
        """Yield replacements of a bad sample: the samples that follow in its lane's window, wrapping around."""
        samples, offset = self._streams[source_number].window_at(stream_position)
        for distance in range(1, len(samples)):
            yield int(samples[(offset + distance) % len(samples)])

    def upcoming_shards(self, batch_index: int, start_slot: int, stop_slot: int) -> list[tuple[int, int]]:
        """Return (source, shard) pairs read by the lanes of these slots: first of this step, then of the next windows.

        Every lane includes all sources, even a source without a sample in this step. No duplicates.
        """
        _, positions = self._deal_slots(batch_index, start_slot, stop_slot)
        current: list[tuple[int, int]] = []
        upcoming: list[tuple[float, list[tuple[int, int]]]] = []  # steps until the window begins, its shards
        before, after = self._samples_before(batch_index), self._samples_before(batch_index + 1)
        for lane in np.unique(positions % self.num_lanes):
            for source, stream in enumerate(self._streams):
                position = before[source] + (int(lane) - before[source]) % self.num_lanes
                while position < max(after[source], before[source] + self.num_lanes):
                    current += [(source, shard) for shard in stream.shards_at(position)]
                    position = stream.next_window(position)
                steps = (position - before[source]) / max(1, after[source] - before[source])
                upcoming.append((steps, [(source, shard) for shard in stream.shards_at(position)]))
        upcoming.sort(key=lambda item: item[0])
        return list(dict.fromkeys(current + [shard for _, shards in upcoming for shard in shards]))

    def _samples_before(self, step: int) -> list[int]:
        """Return the number of samples that every source contributes before a step."""
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        mixed = [epoch * quota + epoch_step * quota // self.steps_per_epoch for quota in self.epoch_quotas[1:]]
        return [step * self.batch_size - sum(mixed), *mixed]

    def _deal_slots(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source and stream position of slots, int64 [stop - start]; slot order is lane, source, position."""
        assert step >= 0 and 0 <= start <= stop <= self.batch_size
        runs = [
            np.arange(first, end, dtype=np.int64)
            for first, end in zip(self._samples_before(step), self._samples_before(step + 1), strict=True)
        ]
        sources = np.repeat(np.arange(len(runs), dtype=np.int64), [len(run) for run in runs])
        positions = np.concatenate(runs)
        chosen = np.argsort(positions % self.num_lanes, kind="stable")[start:stop]
        return sources[chosen], positions[chosen]


class _SourceStream:
    """Endless stream of one source: position p is element p // L of lane p mod L, over all epochs.

    num_lanes: L. lane_length: samples of a lane per epoch. window_shards: shards per shuffle window.
    """

    def __init__(self, counts: np.ndarray, num_lanes: int, lane_length: int, window_shards: int, seed: int) -> None:
        self._counts = counts.astype(np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._num_samples = int(counts.sum())
        self._num_lanes, self._lane_length, self._seed = num_lanes, lane_length, seed
        max_window = math.ceil(window_shards * self._num_samples / len(counts))
        # Windows of equal length: a short last window would make poorly mixed batches.
        self._window = math.ceil(lane_length / math.ceil(lane_length / max_window))
        self._lines: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def samples_at(self, lane: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epochs and samples, int64 [n], at ascending positions of one lane."""
        epochs, lane_positions = np.divmod(positions // self._num_lanes, self._lane_length)
        blocks, offsets = np.divmod(lane_positions, self._window)
        samples = np.empty_like(positions)
        edges = np.flatnonzero((np.diff(epochs) != 0) | (np.diff(blocks) != 0)) + 1
        for run in np.split(np.arange(len(positions)), edges):
            epoch, block = int(epochs[run[0]]), int(blocks[run[0]])
            if lane not in self._windows or self._windows[lane][0] != (epoch, block):
                self._windows[lane] = ((epoch, block), self._window_samples(lane, epoch, block))
            samples[run] = self._windows[lane][1][offsets[run]]
        return epochs, samples

    def window_at(self, position: int) -> tuple[np.ndarray, int]:
        """Return the shuffled samples of the window that contains a position, and the position's offset in it."""
        lane, epoch, block, offset = self._locate(position)
        cached = self._windows.get(lane)
        if cached is not None and cached[0] == (epoch, block):
            return cached[1], offset
        return self._window_samples(lane, epoch, block), offset  # not cached: the lane has passed this window

    def next_window(self, position: int) -> int:
        """Return the first position of the next window in the lane of a position."""
        _, _, block, offset = self._locate(position)
        return position + (self._window_length(block) - offset) * self._num_lanes

    def shards_at(self, position: int) -> list[int]:
        """Return the shards that the window of a position reads."""
        lane, epoch, block, _ = self._locate(position)
        shards, ends, rotation = self._shard_line(epoch)
        start = (lane * self._lane_length + block * self._window + rotation) % self._num_samples
        stop = start + self._window_length(block)
        ranges = [(start, min(stop, self._num_samples)), (0, max(0, stop - self._num_samples))]
        window_shards: list[int] = []
        for low, high in ranges:
            if high > low:
                first, last = np.searchsorted(ends, (low, high - 1), side="right")
                window_shards += [int(shard) for shard in shards[first : last + 1] if self._counts[shard]]
        return window_shards

    def _locate(self, position: int) -> tuple[int, int, int, int]:
        """Return lane, epoch, window number in the lane's epoch, and offset in the window."""
        stream_position, lane = divmod(position, self._num_lanes)
        epoch, lane_position = divmod(stream_position, self._lane_length)
        block, offset = divmod(lane_position, self._window)
        return lane, epoch, block, offset

    def _window_length(self, block: int) -> int:
        return min(self._window, self._lane_length - block * self._window)

    def _window_samples(self, lane: int, epoch: int, block: int) -> np.ndarray:
        length = self._window_length(block)
        line_positions = lane * self._lane_length + block * self._window + np.arange(length, dtype=np.int64)
        shuffle = draw_permutation(derive_key(self._seed, epoch, "window", lane, block), length)
        return self._samples_on_line(epoch, line_positions)[shuffle]

    def _samples_on_line(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of the epoch's rotated shard sequence."""
        shards, ends, rotation = self._shard_line(epoch)
        positions = (positions + rotation) % self._num_samples
        nth = np.searchsorted(ends, positions, side="right")
        shard = shards[nth]
        return self._first[shard] + positions - (ends[nth] - self._counts[shard])

    def _shard_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the epoch's shard order, the end of every shard in that sequence, and the rotation."""
        if epoch not in self._lines:
            shards = draw_permutation(derive_key(self._seed, epoch, "shards"), len(self._counts))
            rotation = draw_integer(derive_key(self._seed, epoch, "rotate"), self._num_samples)
            if len(self._lines) == 2:  # this epoch, and the next for prefetching
                del self._lines[min(self._lines)]
            self._lines[epoch] = (shards, np.cumsum(self._counts[shards]), rotation)
        return self._lines[epoch]


def batch_index_for_step(step: int, skipped_batches: Sequence[int]) -> int:
    """Return the index of the batch that a step uses when ``skipped_batches`` (ascending) are omitted."""
    index = step
    for skipped in skipped_batches:
        if skipped > index:
            break
        index += 1
    return index


def _compute_quotas(
    sizes: Sequence[int], batch: int, lanes: int, shares: Sequence[float]
) -> tuple[int, tuple[int, ...]]:
    """Return the steps of an epoch and every source's samples in it, whose sum is exactly steps x batch.

    Shares are exact decimal fractions, so that 0.3 of 1,000 is 300 on every machine.
    """
    if not shares:
        if sizes[0] < batch:
            raise DataError(
                f"a batch of {batch} images cannot be filled from {sizes[0]} samples: "
                f"lower batch.global_size to {sizes[0]} or less, or give more data"
            )
        return sizes[0] // batch, (sizes[0] // batch * batch,)
    exact = [Fraction(repr(float(share))) for share in shares]
    first_share = 1 - sum(exact)  # of source 0
    assert first_share > 0
    names = ["data.path", *(f"data.mix[{number}]" for number in range(len(shares)))]
    for name, size in zip(names, sizes, strict=True):
        if size < lanes:
            raise DataError(f"{name} has {size} samples for {lanes} lanes: lower data.lanes, or give more data")
    steps = math.floor(sizes[0] / (batch * first_share))
    if not steps:
        raise DataError(
            f"data.path has {sizes[0]} samples, and its share of a batch of {batch} images is "
            f"{float(batch * first_share):g}: lower batch.global_size, or give more data"
        )
    mixed_quotas = [round(steps * batch * share) for share in exact]
    # Source 0 fills the rest of every batch, which must not be negative.
    if sum(-(-quota // steps) for quota in mixed_quotas) > batch:
        raise ConfigError(
            f"a batch of {batch} images is too small for the shares {list(shares)} in data.mix: "
            f"raise batch.global_size to {math.ceil(3 * len(shares) / (2 * first_share))} or more, or give the sets less"
        )
    return steps, (steps * batch - sum(mixed_quotas), *mixed_quotas)


def rank_slot_range(batch_size: int, num_lanes: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the slots [start, stop) of a step that a rank takes.

    Raises: ConfigError, with the nearest valid batch size and world sizes, if the ranks do not divide the batch.
    """
    assert 0 <= rank < world_size
    if batch_size % world_size:
        unit = math.lcm(world_size, num_lanes)
        fit = max(1, round(batch_size / unit)) * unit
        fit = fit if fit >= 2 * num_lanes else 2 * num_lanes * world_size // math.gcd(2 * num_lanes, world_size)
        raise ConfigError(
            f"a batch of {batch_size} images cannot be dealt to {world_size} ranks equally: the nearest batch that "
            f"fits is {fit} (batch.global_size), the nearest number of ranks is "
            f"{_nearest_divisors(batch_size, world_size)}"
        )
    rank_batch = batch_size // world_size
    return rank * rank_batch, (rank + 1) * rank_batch


def microbatches_per_step(batch_size: int, world_size: int, microbatch_size: int) -> int:
    """Return the number of microbatches per rank and optimizer step.

    Raises: ConfigError, with the nearest valid sizes, if the microbatch size does not divide a rank's images per step.
    """
    rank_batch = batch_size // world_size
    if rank_batch % microbatch_size:
        raise ConfigError(
            f"batch.max_micro_size={microbatch_size} does not divide the {rank_batch} images that each of {world_size} ranks "
            f"takes from a batch of {batch_size}: use {_nearest_divisors(rank_batch, microbatch_size)}; "
            f"it does not change the result"
        )
    return rank_batch // microbatch_size


def _nearest_divisors(number: int, target: int) -> str:
    """Return the divisors of ``number`` next below and next above ``target``, as '8 or 16'."""
    all_divisors = divisors(number)
    below = max((divisor for divisor in all_divisors if divisor < target), default=0)
    above = min((divisor for divisor in all_divisors if divisor > target), default=0)
    return " or ".join(str(divisor) for divisor in (below, above) if divisor)
