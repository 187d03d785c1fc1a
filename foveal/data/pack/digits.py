"""Packing of scikit-learn's handwritten digits, the data set of the demo."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, split_train_val
from foveal.data.pack.writer import write_dataset_if_absent

_VAL_PER_CLASS = 36
_SAMPLES_PER_SHARD = 256


def pack_digits(output_folder: Path) -> bool:
    """Pack scikit-learn's digits as PNG: 1,437 for training, 360 (36 per class) for validation.

    Return whether the shards were written now; an existing data set is left unchanged.
    Raises: DataError if the folder holds other files or another data set.
    """
    options = PackOptions(samples_per_shard=_SAMPLES_PER_SHARD)
    return write_dataset_if_absent(output_folder, PackSource("digits"), _load_dataset, options)


def _load_dataset() -> PackDataset:
    from sklearn.datasets import load_digits  # imported here: half a second that only packing needs

    digits: Any = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the source has levels 0..16
    train, val = split_train_val(digits.target, lambda counts: np.full_like(counts, _VAL_PER_CLASS))

    def get_sample(number: int) -> PackSample:
        name = f"digit_{number:04d}"
        return PackSample(name, "png", int(digits.target[number]), lambda: _encode_png(grey[number]), name)

    pixels = grey[train] / 255.0
    return PackDataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        splits={
            name: PackSplit(numbers, digits.target[numbers], get_sample)
            for name, numbers in (("train", train), ("val", val))
        },
        pixel_stats=((float(pixels.mean()),), (float(pixels.std()),)),
    )


def _encode_png(grey: np.ndarray) -> bytes:
    """Encode an uncompressed PNG: its size, and so the data set's digest, is the same for every zlib."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="PNG", compress_level=0)
    return stream.getvalue()
