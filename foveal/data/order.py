"""Which sample stands in which slot of which step: arithmetic on (seed, epoch), no state, no I/O.

An epoch lays its shards end to end in a new order, rotates that line, and cuts it into equal lanes; each lane shuffles
within windows, and a step takes the next samples of every lane, lane after lane. Nothing depends on the number of
ranks: rank r of R takes its run of the slots, so any R that divides the batch sees the same global batch.
"""

import math

import numpy as np

from foveal.errors import ConfigError, DataError
from foveal.seeding import below, key, permutation


class Order:
    """The order of all epochs of one part of a split. Not for several threads at once: it remembers its last blocks.

    counts: samples per shard, int64 [S]; batch: images per step over all ranks; lanes: streams per epoch;
    window: shards that a lane shuffles over. Samples are positions 0..N-1 in the order of the shards as given.
    Memory: O(S) and one window for each lane touched, never O(N).
    Errors: ConfigError if the lanes do not fit the batch, DataError if there are fewer samples than one batch.
    """

    def __init__(self, counts: np.ndarray, batch: int, lanes: int, window: int, seed: int) -> None:
        check_lanes(batch, lanes)
        self.samples = int(counts.sum())
        if self.samples < batch:
            raise DataError(
                f"a batch of {batch} images cannot be filled from {self.samples} samples: "
                f"lower batch.images to {self.samples} or less, or give more data"
            )
        self.batch, self.lanes, self.seed = batch, lanes, seed
        self.steps_per_epoch = self.samples // batch
        self.dropped = self.samples % batch  # of every epoch, others each time
        self._counts = counts.astype(np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._share = batch // lanes
        self._lane = self.steps_per_epoch * self._share
        self._window = math.ceil(window * self.samples / len(counts))
        self._line: tuple[int, np.ndarray, np.ndarray, int] | None = None
        self._blocks: dict[int, tuple[int, int, np.ndarray]] = {}

    def epoch_of(self, step: int) -> int:
        """The epoch that a global step belongs to, from 0."""
        return step // self.steps_per_epoch

    def slots(self, step: int, start: int, stop: int) -> np.ndarray:
        """Sample positions, int64 [stop - start], of the slots start..stop-1 of the global step."""
        assert step >= 0 and 0 <= start <= stop <= self.batch
        epoch, turn = divmod(step, self.steps_per_epoch)
        lane, within = np.divmod(np.arange(start, stop, dtype=np.int64), self._share)
        place = turn * self._share + within
        block = place // self._window
        shuffled = np.empty_like(place)
        edges = np.flatnonzero((np.diff(lane) != 0) | (np.diff(block) != 0)) + 1
        for run in np.split(np.arange(stop - start), edges) if stop > start else ():
            which = int(block[run[0]])
            offsets = place[run] - which * self._window
            shuffled[run] = which * self._window + self._block(epoch, int(lane[run[0]]), which)[offsets]
        return self._samples_at(epoch, lane * self._lane + shuffled)

    def _block(self, epoch: int, lane: int, block: int) -> np.ndarray:
        last = self._blocks.get(lane)
        if last is None or last[:2] != (epoch, block):
            length = min(self._window, self._lane - block * self._window)
            last = (epoch, block, permutation(key(self.seed, epoch, "window", lane, block), length))
            self._blocks[lane] = last
        return last[2]

    def _samples_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """From places on the epoch's rotated line to samples."""
        if self._line is None or self._line[0] != epoch:
            shards = permutation(key(self.seed, epoch, "shards"), len(self._counts))
            ends = np.cumsum(self._counts[shards])
            self._line = (epoch, shards, ends, below(key(self.seed, epoch, "rotate"), self.samples))
        _, shards, ends, rotation = self._line
        places = (places + rotation) % self.samples
        nth = np.searchsorted(ends, places, side="right")
        shard = shards[nth]
        return self._first[shard] + places - (ends[nth] - self._counts[shard])


def check_lanes(batch: int, lanes: int) -> None:
    """Lanes divide the batch, at least two images each so that mixup finds its partner in its own lane.

    Errors: ConfigError that names the nearest number of lanes that fits.
    """
    fitting = [number for number in divisors(batch) if batch // number >= 2 or batch == 1]
    if lanes not in fitting:
        nearest = min(fitting, key=lambda number: (abs(number - lanes), number))
        raise ConfigError(
            f"data.lanes={lanes} does not fit a batch of {batch} images: lanes divide the batch, with 2 images or more "
            f"in each; the nearest that fits is data.lanes={nearest}"
        )


def rank_slots(batch: int, lanes: int, rank: int, size: int) -> tuple[int, int]:
    """The slots [start, stop) of a step that rank ``rank`` of ``size`` takes.

    Errors: ConfigError that names the nearest batch and the nearest numbers of ranks that fit.
    """
    assert 0 <= rank < size
    if batch % size:
        unit = math.lcm(size, lanes)
        fit = max(1, round(batch / unit)) * unit
        fit = fit if fit >= 2 * lanes else 2 * lanes * size // math.gcd(2 * lanes, size)
        raise ConfigError(
            f"a batch of {batch} images cannot be dealt to {size} ranks equally: the nearest batch that fits is "
            f"{fit} (batch.images), the nearest numbers of ranks are {_around(batch, size)}"
        )
    share = batch // size
    return rank * share, (rank + 1) * share


def micros_per_step(batch: int, size: int, at_once: int) -> int:
    """Micro-batches of ``at_once`` images that each of ``size`` ranks takes per step.

    Errors: ConfigError that names the nearest values of at_once that fit.
    """
    share = batch // size
    if share % at_once:
        raise ConfigError(
            f"batch.at_once={at_once} does not divide the {share} images that each of {size} ranks takes from a batch "
            f"of {batch}: use {_around(share, at_once)}; it does not change the result"
        )
    return share // at_once


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})


def _around(number: int, wanted: int) -> str:
    """The divisors of ``number`` just below and just above ``wanted``, as '8 or 16'."""
    fitting = divisors(number)
    near = [max((d for d in fitting if d < wanted), default=0), min((d for d in fitting if d > wanted), default=0)]
    return " or ".join(str(divisor) for divisor in near if divisor)
