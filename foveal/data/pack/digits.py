"""scikit-learn's handwritten digits: the data set of the demo."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, split_train_val
from foveal.data.pack.writer import write_dataset

_VAL_PER_CLASS = 36
_SHARD = 256


def pack_digits(output_folder: Path) -> bool:
    """scikit-learn's handwritten digits as PNG shards: 1,437 for training, 360 for validation, 36 of each class.

    Returns whether they were written now; a folder that holds them already is left alone.
    Raises: DataError if the folder holds something else.
    """
    return write_dataset(output_folder, _load_dataset, PackOptions(samples_per_shard=_SHARD))


def _load_dataset() -> PackDataset:
    from sklearn.datasets import load_digits  # half a second of import that only packing needs

    digits: Any = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0..16
    train, val = split_train_val(digits.target, lambda counts: np.full_like(counts, _VAL_PER_CLASS))

    def sample(number: int) -> PackSample:
        name = f"digit_{number:04d}"
        return PackSample(name, "png", int(digits.target[number]), lambda: _png(grey[number]), name)

    scaled = grey[train] / 255.0
    return PackDataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        splits={"train": PackSplit(train, sample), "val": PackSplit(val, sample)},
        pixel_stats=((float(scaled.mean()),), (float(scaled.std()),)),
    )


def _png(grey: np.ndarray) -> bytes:
    """A stored (not deflated) PNG: its size, and so the data set's digest, is the same for every zlib."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="PNG", compress_level=0)
    return stream.getvalue()
