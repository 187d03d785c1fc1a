"""Labels that vary in shape and are longer than a socket holds, so that a worker sends an answer in pieces."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foveal.data.image.targets import AppliedCrop, LabelReader

_BYTES = 1 << 20


class LongLabels(LabelReader):
    """A megabyte for every image of the digits."""

    field = "cls"

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        return np.zeros(_BYTES, np.uint8)

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros(0, np.uint8)

    def collate(self, labels: Sequence[np.ndarray | None], output_hw: tuple[int, int]) -> Tensor:
        return torch.zeros(len(labels))
