"""The index of one shard: where each sample's members lie in the tar, and its label.

A file `<shard>.index` is a safetensors file of offsets and sizes int64 [n, F] (size -1: the sample has no such member),
labels int64 [n] (-1: none), key_ends int64 [n] and keys uint8. Its metadata is one JSON text of format, shard, bytes, fields and digest:
safetensors writes several entries in an order that changes from run to run, and the same shard must give the same file.
It is mapped, not read: safetensors' own reader copies on every access, too slow for a look-up per sample.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from foveal.errors import DataError

FORMAT = 1
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")  # members that are the image, by preference

_TENSORS = ("offsets", "sizes", "labels", "key_ends", "keys")
_TYPES = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class ShardIndex:
    """n samples of one shard with F kinds of members; arrays as in the file."""

    shard: str
    bytes: int
    fields: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    key_ends: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """The name of a sample in its shard."""
        start = self.key_ends[row - 1] if row else 0
        return bytes(self.keys[start : self.key_ends[row]]).decode(errors="backslashreplace")

    def image(self, row: int) -> tuple[int, int]:
        """Offset and size, in bytes, of a sample's image in the shard."""
        for name in IMAGES:
            if name in self.fields:
                column = self.fields.index(name)
                if self.sizes[row, column] >= 0:
                    return int(self.offsets[row, column]), int(self.sizes[row, column])
        raise DataError(f"{self.shard}: sample '{self.key(row)}' has no image (looked for: {', '.join(IMAGES)})")

    def digest(self) -> str:
        """sha256 of keys, sizes and labels: what the samples are, not where they lie."""
        digest = hashlib.sha256()
        for array in (self.keys, self.key_ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def make_index(
    shard: str, size: int, fields: Sequence[str], members: Sequence[tuple[str, dict[str, tuple[int, int]], int]]
) -> ShardIndex:
    """An index from samples given as (key, {field: (offset, size)}, label)."""
    places = np.full((len(members), len(fields), 2), -1, dtype="<i8")
    for row, (_, found, _) in enumerate(members):
        for name, place in found.items():
            places[row, fields.index(name)] = place
    names = [key.encode(errors="surrogateescape") for key, _, _ in members]
    return ShardIndex(
        shard=shard,
        bytes=size,
        fields=tuple(fields),
        offsets=places[:, :, 0].copy(),
        sizes=places[:, :, 1].copy(),
        labels=np.array([label for _, _, label in members], dtype="<i8"),
        key_ends=np.cumsum([len(name) for name in names], dtype="<i8"),
        keys=np.frombuffer(b"".join(names), dtype="u1"),
    )


def write_index(index: ShardIndex, file: Path) -> None:
    """Write an index; the file appears whole or not at all."""
    tensors = {name: getattr(index, name) for name in _TENSORS}
    about = {"format": FORMAT, "shard": index.shard, "bytes": index.bytes, "fields": index.fields}
    metadata = {"index": json.dumps({**about, "digest": index.digest()})}
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(safetensors.numpy.save(tensors, metadata))
    draft.replace(file)


def open_index(file: Path, digest: str, samples: int) -> ShardIndex:
    """Map an index whose digest and number of samples the manifest knows.

    Errors: DataError if it is missing, of another format, damaged, or not the one that the manifest was written with.
    """
    again = f"run `foveal data index {file.parent}` again"
    try:
        header, mapped, start = _header(file)
        about = json.loads(header["__metadata__"]["index"])
        if about["format"] != FORMAT:
            raise DataError(f"{file} has format {about['format']}, this foveal reads {FORMAT}: {again}")
        if about["digest"] != digest or header["labels"]["shape"] != [samples]:
            raise DataError(f"{file} is not the index that manifest.json was written with: {again}")
        arrays = {name: _array(mapped, start, header[name]) for name in _TENSORS}
        return ShardIndex(about["shard"], about["bytes"], tuple(about["fields"]), **arrays)
    except FileNotFoundError:
        raise DataError(f"{file} is missing: {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no index of a shard ({error}): {again}") from None


def _header(file: Path) -> tuple[dict, mmap.mmap, int]:
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    return json.loads(mapped[8:start]), mapped, start


def _array(mapped: mmap.mmap, start: int, entry: dict) -> np.ndarray:
    count = math.prod(entry["shape"])
    array = np.frombuffer(mapped, _TYPES[entry["dtype"]], count, start + entry["data_offsets"][0])
    return array.reshape(entry["shape"])
