"""Numbers that stay on the device until somebody reads them: one row a step, reduced over ranks many rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

MetricRow = dict[str, float]


class MetricAccumulator:
    """The rows of the steps since the last read.

    Each number is a rank's share of a whole: summing the shares over ranks gives the number. ``host`` values are
    already the same on every rank (learning rate, gradient norm) and are not reduced.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._shares: list[Tensor] = []
        self._host: list[MetricRow] = []

    def add_step(self, rank_sums: dict[str, Tensor], host_values: MetricRow) -> None:
        """One step: ``shares`` are scalars on the device."""
        names = tuple(rank_sums)
        assert not self._shares or names == self._names, "an objective reports the same numbers every step"
        self._names = names
        self._shares.append(torch.stack([value.detach().double() for value in rank_sums.values()]))
        self._host.append(host_values)

    def read_rows(self, reduce: Callable[[Tensor], Tensor]) -> list[MetricRow]:
        """Every row since the last read, reduced: one collective and one copy from the device, however many steps."""
        if not self._shares:
            return []
        whole = reduce(torch.stack(self._shares)).tolist()
        rows = [
            dict(zip(self._names, values, strict=True)) | host for values, host in zip(whole, self._host, strict=True)
        ]
        self._shares, self._host = [], []
        return [{"step": row.pop("step"), **row} for row in rows]
