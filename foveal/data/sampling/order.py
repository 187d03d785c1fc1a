"""Which sample stands in which slot of which step: arithmetic on (seed, epoch), no state that counts, no I/O.

An epoch of a source lays its shards end to end in a new order, rotates that line, and cuts it into equal lanes; each
lane shuffles within windows, and a step takes the next samples of every lane, lane after lane. Nothing depends on the
number of ranks: rank r of R takes its run of the slots, so any R that divides the batch sees the same global batch.
Several sources are dealt by quotas in closed form: how many samples each has given before a step is a formula too.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from foveal.errors import ConfigError, DataError
from foveal.seeding import derive_key, draw_integer, draw_permutation


@dataclass(frozen=True)
class SampleSlots:
    """n slots of one step, in slot order; all int64 [n].

    sources: 0 is the set of data.path, k is data.mix[k - 1]; positions: place in the source's endless stream of
    samples; epochs: epoch of the source, which in a mixture is not the mixture's; samples: position in the source's
    part, 0..N_k-1, in the order of its shards as given.
    """

    source_numbers: np.ndarray
    stream_positions: np.ndarray
    epochs: np.ndarray
    subset_positions: np.ndarray


class SampleOrder:
    """The order of all epochs of one source of samples, or of a mixture. Serves several threads.

    counts: samples per shard of source 0, int64 [S]; batch: images per step over all ranks; lanes: streams per epoch;
    window: shards that a lane shuffles over; mix: counts and share of the batch of every further source.
    samples: of source 0; sizes: samples of every source; quotas: what each gives to an epoch, exactly; dropped: samples
    of source 0 that its epoch leaves out, others each time. The epoch of a mixture is the steps in which source 0 goes
    once through its samples; the other sources have epochs of their own length.
    Memory: O(S) and one window for each lane touched, never O(N).
    Raises: ConfigError if the lanes do not fit the batch or the shares cannot be dealt in it, DataError if source 0 has
    fewer samples than its part of one batch, or any source fewer than lanes.
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
        self.source_sizes = (int(samples_per_shard.sum()), *(int(other.sum()) for other, _ in mix))
        self.num_samples = self.source_sizes[0]
        self.steps_per_epoch, self.epoch_quotas = _compute_quotas(
            self.source_sizes, batch_size, num_lanes, [share for _, share in mix]
        )
        usable = self.steps_per_epoch * batch_size if not mix else self.num_samples // num_lanes * num_lanes
        self.dropped_per_epoch = self.num_samples - usable
        self._streams = [_SourceStream(samples_per_shard, num_lanes, usable // num_lanes, window_shards, seed)]
        for number, (other, _) in enumerate(mix, start=1):
            length = self.source_sizes[number] // num_lanes
            self._streams.append(
                _SourceStream(other, num_lanes, length, window_shards, derive_key(seed, "source", number))
            )
        self._lock = threading.Lock()

    def epoch_at_step(self, step: int) -> int:
        """The epoch that a global step belongs to, from 0; of the mixture if there are several sources."""
        return step // self.steps_per_epoch

    def assign_slots(self, step: int, start_slot: int, stop_slot: int) -> SampleSlots:
        """The slots start..stop-1 of the global step. Lane-major: a run of them touches few lanes."""
        sources, positions = self._deal_slots(step, start_slot, stop_slot)
        found = SampleSlots(sources, positions, np.empty_like(positions), np.empty_like(positions))
        lanes = positions % self.num_lanes
        edges = np.flatnonzero((np.diff(lanes) != 0) | (np.diff(sources) != 0)) + 1
        with self._lock:
            for run in np.split(np.arange(stop_slot - start_slot), edges) if stop_slot > start_slot else ():
                stream = self._streams[sources[run[0]]]
                found.epochs[run], found.subset_positions[run] = stream.samples_at(int(lanes[run[0]]), positions[run])
        return found

    def replacements(self, source_number: int, stream_position: int) -> Iterator[int]:
        """What may stand in for a sample that is bad: those that follow it in its lane's window, wrapping round."""
        with self._lock:
            samples, offset = self._streams[source_number].window_at(stream_position)
        for turn in range(1, len(samples)):
            yield int(samples[(offset + turn) % len(samples)])

    def upcoming_shards(self, step: int, start_slot: int, stop_slot: int) -> list[tuple[int, int]]:
        """(source, shard) that the lanes of these slots read: those of the step first, then those of the next windows.

        A lane counts for all sources, even one that gives it nothing in this very step. No duplicates.
        """
        _, positions = self._deal_slots(step, start_slot, stop_slot)
        now: list[tuple[int, int]] = []
        soon: list[tuple[float, list[tuple[int, int]]]] = []
        before, after = self._samples_before(step), self._samples_before(step + 1)
        with self._lock:
            for lane in np.unique(positions % self.num_lanes):
                for source, stream in enumerate(self._streams):
                    position = before[source] + (int(lane) - before[source]) % self.num_lanes
                    while position < max(after[source], before[source] + self.num_lanes):
                        now += [(source, shard) for shard in stream.shards_at(position)]
                        position = stream.next_window(position)
                    steps = (position - before[source]) / max(1, after[source] - before[source])
                    soon.append((steps, [(source, shard) for shard in stream.shards_at(position)]))
        soon.sort(key=lambda each: each[0])
        return list(dict.fromkeys(now + [shard for _, shards in soon for shard in shards]))

    def _samples_before(self, step: int) -> list[int]:
        """Samples that every source has given before a step."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        others = [epoch * quota + turn * quota // self.steps_per_epoch for quota in self.epoch_quotas[1:]]
        return [step * self.batch_size - sum(others), *others]

    def _deal_slots(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and position, int64 [stop - start], of slots: all of the step by lane, then source, then position."""
        assert step >= 0 and 0 <= start <= stop <= self.batch_size
        runs = [
            np.arange(*given, dtype=np.int64)
            for given in zip(self._samples_before(step), self._samples_before(step + 1), strict=True)
        ]
        sources = np.repeat(np.arange(len(runs), dtype=np.int64), [len(run) for run in runs])
        positions = np.concatenate(runs)
        chosen = np.argsort(positions % self.num_lanes, kind="stable")[start:stop]
        return sources[chosen], positions[chosen]


class _SourceStream:
    """The endless stream of one source: position p lies in lane p mod L, at place p // L of the lanes' epochs."""

    def __init__(self, counts: np.ndarray, lanes: int, length: int, window: int, seed: int) -> None:
        self._counts = counts.astype(np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._samples = int(counts.sum())
        self._lanes, self._length, self._seed = lanes, length, seed  # length: samples of a lane's epoch
        most = math.ceil(window * self._samples / len(counts))
        self._window = math.ceil(length / math.ceil(length / most))  # equal ones: a short last one makes poor batches
        self._lines: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def samples_at(self, lane: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and samples, int64 [n], of ascending positions of one lane."""
        epochs, places = np.divmod(positions // self._lanes, self._length)
        blocks, offsets = np.divmod(places, self._window)
        samples = np.empty_like(positions)
        edges = np.flatnonzero((np.diff(epochs) != 0) | (np.diff(blocks) != 0)) + 1
        for run in np.split(np.arange(len(positions)), edges):
            place = (int(epochs[run[0]]), int(blocks[run[0]]))
            if lane not in self._windows or self._windows[lane][0] != place:
                self._windows[lane] = (place, self._window_samples(lane, *place))
            samples[run] = self._windows[lane][1][offsets[run]]
        return epochs, samples

    def window_at(self, position: int) -> tuple[np.ndarray, int]:
        """The samples of the window that a position lies in, in their shuffled order, and where in it that is."""
        lane, epoch, block, offset = self._locate(position)
        kept = self._windows.get(lane)
        if kept is not None and kept[0] == (epoch, block):
            return kept[1], offset
        return self._window_samples(lane, epoch, block), offset  # not kept: the lane has moved on and will not return

    def next_window(self, position: int) -> int:
        """The first position of the window after that of a position, in the same lane."""
        _, _, block, offset = self._locate(position)
        return position + (self._window_length(block) - offset) * self._lanes

    def shards_at(self, position: int) -> list[int]:
        """The shards that the window of a position is read from."""
        lane, epoch, block, _ = self._locate(position)
        shards, ends, rotation = self._shard_line(epoch)
        begin = (lane * self._length + block * self._window + rotation) % self._samples
        stop = begin + self._window_length(block)
        pieces = [(begin, min(stop, self._samples)), (0, max(0, stop - self._samples))]
        found: list[int] = []
        for low, high in pieces:
            if high > low:
                first, last = np.searchsorted(ends, (low, high - 1), side="right")
                found += [int(shard) for shard in shards[first : last + 1] if self._counts[shard]]
        return found

    def _locate(self, position: int) -> tuple[int, int, int, int]:
        """Lane, epoch, number of the window in the lane's epoch, and place in the window."""
        turn, lane = divmod(position, self._lanes)
        epoch, place = divmod(turn, self._length)
        return (lane, epoch, *divmod(place, self._window))

    def _window_length(self, block: int) -> int:
        return min(self._window, self._length - block * self._window)

    def _window_samples(self, lane: int, epoch: int, block: int) -> np.ndarray:
        length = self._window_length(block)
        places = lane * self._length + block * self._window + np.arange(length, dtype=np.int64)
        shuffle = draw_permutation(derive_key(self._seed, epoch, "window", lane, block), length)
        return self._samples_at(epoch, places)[shuffle]

    def _samples_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """From places on the epoch's rotated line to samples."""
        shards, ends, rotation = self._shard_line(epoch)
        places = (places + rotation) % self._samples
        nth = np.searchsorted(ends, places, side="right")
        shard = shards[nth]
        return self._first[shard] + places - (ends[nth] - self._counts[shard])

    def _shard_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Shards in the epoch's order, where each ends on the line, and how far the line is rotated."""
        if epoch not in self._lines:
            shards = draw_permutation(derive_key(self._seed, epoch, "shards"), len(self._counts))
            rotation = draw_integer(derive_key(self._seed, epoch, "rotate"), self._samples)
            if len(self._lines) == 2:  # this epoch, and the next for those who look ahead
                del self._lines[min(self._lines)]
            self._lines[epoch] = (shards, np.cumsum(self._counts[shards]), rotation)
        return self._lines[epoch]


def batch_index_for_step(step: int, skipped_batches: Sequence[int]) -> int:
    """The number of the batch that a step takes when the batches in ``skipped`` (ascending) are passed over."""
    number = step
    for batch in skipped_batches:
        if batch > number:
            break
        number += 1
    return number


def _compute_quotas(
    sizes: Sequence[int], batch: int, lanes: int, shares: Sequence[float]
) -> tuple[int, tuple[int, ...]]:
    """Steps of an epoch, and the samples that every source gives to it: together steps x batch, exactly.

    Shares count as the decimal numbers that they are written as, so that 0.3 of 1,000 is 300 on every machine.
    """
    if not shares:
        if sizes[0] < batch:
            raise DataError(
                f"a batch of {batch} images cannot be filled from {sizes[0]} samples: "
                f"lower batch.images to {sizes[0]} or less, or give more data"
            )
        return sizes[0] // batch, (sizes[0] // batch * batch,)
    exact = [Fraction(repr(float(share))) for share in shares]
    rest = 1 - sum(exact)
    assert rest > 0
    names = ["data.path", *(f"data.mix[{number}]" for number in range(len(shares)))]
    for name, size in zip(names, sizes, strict=True):
        if size < lanes:
            raise DataError(f"{name} has {size} samples for {lanes} lanes: lower data.lanes, or give more data")
    steps = math.floor(sizes[0] / (batch * rest))
    if not steps:
        raise DataError(
            f"data.path has {sizes[0]} samples, and its share of a batch of {batch} images is {float(batch * rest):g}: "
            f"lower batch.images, or give more data"
        )
    others = [round(steps * batch * share) for share in exact]
    if (
        sum(-(-quota // steps) for quota in others) > batch
    ):  # source 0 fills up what is left, which must not be negative
        raise ConfigError(
            f"a batch of {batch} images is too small for the shares {list(shares)} in data.mix: "
            f"raise batch.images to {math.ceil(3 * len(shares) / (2 * rest))} or more, or give the sets less"
        )
    return steps, (steps * batch - sum(others), *others)


def check_lanes(batch_size: int, num_lanes: int) -> None:
    """Lanes divide the batch, at least two images each so that mixup finds its partner in its own lane.

    Raises: ConfigError that names the nearest number of lanes that fits.
    """
    fitting = [number for number in divisors(batch_size) if batch_size // number >= 2 or batch_size == 1]
    if num_lanes not in fitting:
        nearest = min(fitting, key=lambda number: (abs(number - num_lanes), number))
        raise ConfigError(
            f"data.lanes={num_lanes} does not fit a batch of {batch_size} images: lanes divide the batch, with 2 images or more "
            f"in each; the nearest that fits is data.lanes={nearest}"
        )


def rank_slot_range(batch_size: int, num_lanes: int, rank: int, world_size: int) -> tuple[int, int]:
    """The slots [start, stop) of a step that rank ``rank`` of ``size`` takes.

    Raises: ConfigError that names the nearest batch and the nearest numbers of ranks that fit.
    """
    assert 0 <= rank < world_size
    if batch_size % world_size:
        unit = math.lcm(world_size, num_lanes)
        fit = max(1, round(batch_size / unit)) * unit
        fit = fit if fit >= 2 * num_lanes else 2 * num_lanes * world_size // math.gcd(2 * num_lanes, world_size)
        raise ConfigError(
            f"a batch of {batch_size} images cannot be dealt to {world_size} ranks equally: the nearest batch that fits is "
            f"{fit} (batch.images), the nearest numbers of ranks are {_nearest_divisors(batch_size, world_size)}"
        )
    share = batch_size // world_size
    return rank * share, (rank + 1) * share


def microbatches_per_step(batch_size: int, world_size: int, microbatch_size: int) -> int:
    """Micro-batches of ``at_once`` images that each of ``size`` ranks takes per step.

    Raises: ConfigError that names the nearest values of at_once that fit.
    """
    share = batch_size // world_size
    if share % microbatch_size:
        raise ConfigError(
            f"batch.at_once={microbatch_size} does not divide the {share} images that each of {world_size} ranks takes from a batch "
            f"of {batch_size}: use {_nearest_divisors(share, microbatch_size)}; it does not change the result"
        )
    return share // microbatch_size


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` just below and just above ``wanted``, as '8 or 16'."""
    fitting = divisors(number)
    near = [max((d for d in fitting if d < wanted), default=0), min((d for d in fitting if d > wanted), default=0)]
    return " or ".join(str(divisor) for divisor in near if divisor)
