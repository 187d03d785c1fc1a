"""A curve of any length in bounded memory: buckets of neighbouring rows with minimum, maximum and mean."""

import math
from dataclasses import dataclass, field, replace

MAX_BUCKETS = 1000  # a minimum and a maximum of each make at most 2,000 points
Point = tuple[int, float | None]  # (step, value); None: a gap, where a value was not finite


@dataclass(slots=True)
class _Bucket:
    low: tuple[int, float] | None  # (step, value); None: no value was finite
    high: tuple[int, float] | None
    total: float
    num_finite: int
    first_step: int
    last_step: int
    num_rows: int = 1

    def add(self, step: int, pair: tuple[int, float] | None) -> None:
        """Take up a row; None: its value is not finite."""
        self.last_step = step
        self.num_rows += 1
        if pair is None:
            return
        value = pair[1]
        if self.low is None or value < self.low[1]:
            self.low = pair
        if self.high is None or value > self.high[1]:
            self.high = pair
        self.total += value
        self.num_finite += 1

    def mean(self) -> float | None:
        """Return the mean of the finite values, within their range: that of equal values is the value."""
        if self.low is None or self.high is None:
            return None
        return min(max(self.total / self.num_finite, self.low[1]), self.high[1])

    def merge(self, other: "_Bucket") -> None:
        """Take up the rows of a later bucket."""
        pairs = [pair for pair in (self.low, other.low) if pair is not None]
        self.low = min(pairs, key=lambda pair: pair[1], default=None)
        pairs = [pair for pair in (self.high, other.high) if pair is not None]
        self.high = max(pairs, key=lambda pair: pair[1], default=None)
        self.total += other.total
        self.num_finite += other.num_finite
        self.last_step = other.last_step
        self.num_rows += other.num_rows


@dataclass
class Series:
    """A metric over steps. ``first``, ``last``, ``lowest``, ``highest``: (step, value) of finite values; exact."""

    num_values: int = 0
    num_nonfinite: int = 0
    first_nonfinite_step: int | None = None
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    lowest: tuple[int, float] | None = None
    highest: tuple[int, float] | None = None
    _stride: int = 1  # rows of a full bucket
    _buckets: list[_Bucket] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Add the value of a step; steps ascend, and a step that is given again replaces those from it on."""
        last = self._buckets[-1] if self._buckets else None
        if last is not None and step < last.last_step:
            self._drop_after(step)
            last = self._buckets[-1] if self._buckets else None
        self.num_values += 1
        is_finite = math.isfinite(value)
        pair = (step, value) if is_finite else None
        if pair is not None:
            self.first, self.last = self.first or pair, pair
            if self.lowest is None or value < self.lowest[1]:
                self.lowest = pair
            if self.highest is None or value > self.highest[1]:
                self.highest = pair
        else:
            self.num_nonfinite += 1
            self.first_nonfinite_step = step if self.first_nonfinite_step is None else self.first_nonfinite_step
        if last is not None and last.num_rows < self._stride:
            last.add(step, pair)
            return
        self._buckets.append(_Bucket(pair, pair, value if is_finite else 0.0, int(is_finite), step, step))
        if len(self._buckets) > 2 * MAX_BUCKETS:
            self._halve()

    def scale_steps(self, factor: int) -> "Series":
        """Return the curve with its steps multiplied, such as by the images of a step."""
        if factor == 1:
            return self

        def scale(pair: tuple[int, float] | None) -> tuple[int, float] | None:
            return None if pair is None else (pair[0] * factor, pair[1])

        return replace(
            self,
            first=scale(self.first),
            last=scale(self.last),
            lowest=scale(self.lowest),
            highest=scale(self.highest),
            _buckets=[
                replace(
                    bucket,
                    low=scale(bucket.low),
                    high=scale(bucket.high),
                    first_step=bucket.first_step * factor,
                    last_step=bucket.last_step * factor,
                )
                for bucket in self._buckets
            ],
        )

    @property
    def is_thinned(self) -> bool:
        """Whether a point stands for several rows."""
        return self._stride > 1 or len(self._buckets) > MAX_BUCKETS

    def points(self) -> list[Point]:
        """Return at most 2,000 points: every row, or the minimum and the maximum of each bucket, by step."""
        if not self.is_thinned:
            return [bucket.low or (bucket.first_step, None) for bucket in self._buckets]
        points: list[Point] = []
        for bucket in self._final_buckets():
            if bucket.low is None or bucket.high is None:
                points.append((bucket.first_step, None))
            else:
                points += sorted({bucket.low, bucket.high})
        return points

    def means(self) -> list[Point]:
        """Return the mean of each bucket's finite values, at its middle step."""
        return [((bucket.first_step + bucket.last_step) // 2, bucket.mean()) for bucket in self._final_buckets()]

    def table(self, max_rows: int) -> list[Point]:
        """Return some rows of the curve, evenly spaced, the first and the last among them."""
        points = [point for point in (self.means() if self.is_thinned else self.points()) if point[1] is not None]
        if len(points) > max_rows:
            points = [points[round(at * (len(points) - 1) / (max_rows - 1))] for at in range(max_rows)]
        if self.is_thinned and points and self.first and self.last:
            points[0], points[-1] = self.first, self.last
        return points

    def _final_buckets(self) -> list[_Bucket]:
        if len(self._buckets) > MAX_BUCKETS:
            self._halve()
        return self._buckets

    def _halve(self) -> None:
        self._stride *= 2
        merged: list[_Bucket] = []
        for bucket in self._buckets:
            if merged and merged[-1].num_rows + bucket.num_rows <= self._stride:
                merged[-1].merge(bucket)
            else:
                merged.append(bucket)
        self._buckets = merged

    def _drop_after(self, step: int) -> None:
        """Forget the rows from a step on, with the other rows of its bucket, of which one value cannot be told."""
        while self._buckets and self._buckets[-1].last_step >= step:
            del self._buckets[-1]
        end = self._buckets[-1].last_step if self._buckets else -1
        lows = [bucket.low for bucket in self._buckets if bucket.low is not None]
        highs = [bucket.high for bucket in self._buckets if bucket.high is not None]
        self.num_values = sum(bucket.num_rows for bucket in self._buckets)
        self.num_nonfinite = self.num_values - sum(bucket.num_finite for bucket in self._buckets)
        self.first = self.first if self.first is not None and self.first[0] <= end else None
        self.last = max([*lows[-1:], *highs[-1:]], default=None)  # of a bucket of several rows, one of its extremes
        self.lowest = min(lows, key=lambda pair: pair[1], default=None)
        self.highest = max(highs, key=lambda pair: pair[1], default=None)
        is_nonfinite_left = self.first_nonfinite_step is not None and self.first_nonfinite_step <= end
        self.first_nonfinite_step = self.first_nonfinite_step if is_nonfinite_left else None
