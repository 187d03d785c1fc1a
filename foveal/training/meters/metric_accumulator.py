"""Metrics that stay on the device until they are read: one row per step, reduced over ranks many rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

MetricRow = dict[str, float]


class MetricAccumulator:
    """The metric rows of the steps since the last read.

    Device values are a rank's summand: the sum over ranks is the metric. Host values (learning rate, gradient norm) are
    equal on every rank and are not reduced.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rank_sums: list[Tensor] = []
        self._host_rows: list[tuple[MetricRow, bool]] = []

    def add_step(self, rank_sums: dict[str, Tensor], host_values: MetricRow) -> None:
        """Add the row of one step; ``rank_sums`` are scalars on the device, ``host_values`` includes ``step``.

        Without ``rank_sums``, on every rank, the row has the host values only.
        """
        if rank_sums:
            names = tuple(rank_sums)
            assert not self._rank_sums or names == self._names, "an objective reports the same numbers every step"
            self._names = names
            self._rank_sums.append(torch.stack([value.detach().double() for value in rank_sums.values()]))
        self._host_rows.append((host_values, bool(rank_sums)))

    def pop_rows(self, reduce: Callable[[Tensor], Tensor]) -> list[MetricRow]:
        """Return the reduced rows since the last read, at the cost of one collective and one copy from the device."""
        table = iter(reduce(torch.stack(self._rank_sums)).tolist() if self._rank_sums else [])
        rows = [
            (dict(zip(self._names, next(table), strict=True)) if has_sums else {}) | host_values
            for host_values, has_sums in self._host_rows
        ]
        self._rank_sums, self._host_rows = [], []
        return [{"step": row.pop("step"), **row} for row in rows]
