"""A curve of any length in bounded memory: buckets of neighbouring rows with minimum, maximum and mean."""

import math
from dataclasses import dataclass, field, replace

MAX_BUCKETS = 1000  # a minimum and a maximum of each make at most 2,000 points
Point = tuple[int, float | None]  # (step, value); None: a gap, where a value was not finite


@dataclass
class _Bucket:
    low: tuple[int, float] | None  # (step, value); None: no value was finite
    high: tuple[int, float] | None
    total: float
    num_finite: int
    first_step: int
    last_step: int
    num_rows: int = 1

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
        if self._buckets and step < self._buckets[-1].last_step:
            self._drop_after(step)
        self.num_values += 1
        pair = (step, value)
        if math.isfinite(value):
            self.first, self.last = self.first or pair, pair
            if self.lowest is None or value < self.lowest[1]:
                self.lowest = pair
            if self.highest is None or value > self.highest[1]:
                self.highest = pair
            bucket = _Bucket(pair, pair, value, 1, step, step)
        else:
            self.num_nonfinite += 1
            self.first_nonfinite_step = step if self.first_nonfinite_step is None else self.first_nonfinite_step
            bucket = _Bucket(None, None, 0.0, 0, step, step)
        if self._buckets and self._buckets[-1].num_rows < self._stride:
            self._buckets[-1].merge(bucket)
        else:
            self._buckets.append(bucket)
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
        return [
            (
                (bucket.first_step + bucket.last_step) // 2,
                bucket.total / bucket.num_finite if bucket.num_finite else None,
            )
            for bucket in self._final_buckets()
        ]

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
        while self._buckets and self._buckets[-1].last_step >= step:
            del self._buckets[-1]
