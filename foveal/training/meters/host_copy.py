"""Copies of scalars from the device to the host, for which the host waits later or never."""

from typing import cast

import torch
from torch import Tensor


class HostCopy:
    """A copy of a scalar, which begins at once, behind the work that the device has been given so far."""

    def __init__(self, value: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._value = value.clone()

    def read(self) -> bool | float:
        """Return the number; waits for the copy, and not for work that the device was given after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return cast(float, self._value.tolist())
