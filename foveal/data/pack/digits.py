"""scikit-learn's handwritten digits: the data set of the demo."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.data.pack.options import Recipe
from foveal.data.pack.source import Contents, Part, Sample, divided
from foveal.data.pack.writer import write

_VAL_PER_CLASS = 36
_SHARD = 256


def pack_digits(folder: Path) -> bool:
    """scikit-learn's handwritten digits as PNG shards: 1,437 for training, 360 for validation, 36 of each class.

    Returns whether they were written now; a folder that holds them already is left alone.
    Errors: DataError if the folder holds something else.
    """
    return write(folder, _contents, Recipe(samples_per_shard=_SHARD))


def _contents() -> Contents:
    from sklearn.datasets import load_digits  # half a second of import that only packing needs

    digits: Any = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0..16
    train, val = divided(digits.target, lambda counts: np.full_like(counts, _VAL_PER_CLASS))

    def sample(number: int) -> Sample:
        name = f"digit_{number:04d}"
        return Sample(name, "png", int(digits.target[number]), lambda: _png(grey[number]), name)

    scaled = grey[train] / 255.0
    return Contents(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        parts={"train": Part(train, sample), "val": Part(val, sample)},
        statistics=((float(scaled.mean()),), (float(scaled.std()),)),
    )


def _png(grey: np.ndarray) -> bytes:
    """A stored (not deflated) PNG: its size, and so the data set's digest, is the same for every zlib."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="PNG", compress_level=0)
    return stream.getvalue()
