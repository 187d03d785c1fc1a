"""Metrics that stay on the device until they are read: one row per step, reduced over ranks many rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

MetricRow = dict[str, float]


class MetricAccumulator:
    """The metric rows of the steps since the last read.

    ``rank_sums`` are a rank's summands on the device: the sum over ranks is the metric. ``replicated`` values (gradient
    norm) are on the device too, and equal on every rank; ``host_values`` (learning rate) are numbers. Neither is
    reduced.
    """

    def __init__(self) -> None:
        self._sum_names: tuple[str, ...] = ()
        self._replicated_names: tuple[str, ...] = ()
        self._rank_sums: list[Tensor] = []
        self._replicated: list[Tensor] = []
        self._host_rows: list[tuple[MetricRow, bool]] = []

    def add_step(self, rank_sums: dict[str, Tensor], replicated: dict[str, Tensor], host_values: MetricRow) -> None:
        """Add the row of one step; tensors are scalars on the device, ``host_values`` includes ``step``.

        Without tensors, on every rank, the row has the host values only.
        """
        if rank_sums:
            names = tuple(rank_sums)
            assert not self._rank_sums or names == self._sum_names, "an objective reports the same numbers every step"
            self._sum_names, self._replicated_names = names, tuple(replicated)
            self._rank_sums.append(_stack(rank_sums))
            self._replicated.append(_stack(replicated))
        self._host_rows.append((host_values, bool(rank_sums)))

    def pop_rows(self, reduce: Callable[[Tensor], Tensor]) -> list[MetricRow]:
        """Return the reduced rows since the last read, at the cost of one collective and one copy from the device."""
        names = self._sum_names + self._replicated_names
        table = iter([])
        if self._rank_sums:
            sums = reduce(torch.stack(self._rank_sums))
            table = iter(torch.cat([sums, torch.stack(self._replicated)], dim=1).tolist())
        rows = [
            (dict(zip(names, next(table), strict=True)) if has_tensors else {}) | host_values
            for host_values, has_tensors in self._host_rows
        ]
        self._rank_sums, self._replicated, self._host_rows = [], [], []
        return [{"step": row.pop("step"), **row} for row in rows]


def _stack(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.detach().double() for value in values.values()])
