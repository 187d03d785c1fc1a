"""Index of one shard: offsets and sizes of every sample's members in the tar, labels and keys.

`<shard>.index` is a safetensors file with n samples and F fields: offsets and sizes int64 [n, F] (size -1: the sample
lacks this member), labels int64 [n] (-1: no label), key_ends int64 [n] and keys uint8. The metadata is one JSON text:
safetensors writes several entries in an order that changes from run to run, and equal shards must give equal files.
The file is memory-mapped: safetensors' own reader copies on every access, which is too slow for one look-up per sample.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from foveal.atomic import write_atomic
from foveal.errors import DataError
from foveal.timeouts import STORAGE_AWAY_ERRNOS

FORMAT_VERSION = 2
INDEX_SUFFIX = ".index"
# Fields that hold the image, by preference.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")

_METADATA_FIELDS = ("shard", "bytes", "rules", "note")
_TENSORS = ("offsets", "sizes", "labels", "key_ends", "keys")
_TYPES = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class IndexRules:
    """Rules that turn the members of a tar into labelled samples.

    classes: class names, by label; numeric labels must be below their number. label_key: key of the label in `.json`
    members (None: the label is the `.cls` member). dotted_keys: the sample key ends at the last dot of a member's
    name, not at the first.
    """

    classes: tuple[str, ...] | None = None
    label_key: str | None = None
    dotted_keys: bool = False

    def to_metadata(self) -> dict[str, str | bool | None]:
        """Return the rules as index metadata; class names, of which there may be thousands, are stored as a sha256."""
        names = None if self.classes is None else hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()
        return {"classes": names, "label_key": self.label_key, "dotted_keys": self.dotted_keys}


@dataclass(frozen=True)
class ShardIndex:
    """Index of n samples with F fields; arrays as in the file.

    bytes: size of the shard. note: warning about the shard, such as a truncated tar. checksum: ``compute_checksum()``
    when the file was written.
    """

    shard: str
    bytes: int
    fields: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    key_ends: np.ndarray
    keys: np.ndarray
    rules: dict[str, str | bool | None] = field(default_factory=IndexRules().to_metadata)
    note: str = ""
    checksum: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        start = self.key_ends[row - 1] if row else 0
        return bytes(self.keys[start : self.key_ends[row]]).decode(errors="backslashreplace")

    def find_image_offset_size(self, row: int) -> tuple[int, int]:
        """Return offset and size, in bytes, of a sample's image. Raises: DataError if the sample has no image."""
        for name in IMAGE_EXTENSIONS:
            if (span := self.find_member_offset_size(row, name)) is not None:
                return span
        raise DataError(
            f"{self.shard}: sample '{self.key(row)}' has no image (looked for: {', '.join(IMAGE_EXTENSIONS)})"
        )

    def find_member_offset_size(self, row: int, field_name: str) -> tuple[int, int] | None:
        """Return offset and size, in bytes, of a sample's member; None if the sample lacks this field.

        Raises: DataError if the member would lie outside the shard.
        """
        if field_name not in self.fields:
            return None
        column = self.fields.index(field_name)
        size = int(self.sizes[row, column])
        if size < 0:
            return None
        offset = int(self.offsets[row, column])
        if not 0 <= offset <= self.bytes - size:
            raise DataError(
                f"{self.shard}: the index has '{self.key(row)}.{field_name}' at byte {offset}, outside of the shard: "
                f"run `foveal data index` on its folder again"
            )
        return offset, size

    def compute_samples_digest(self) -> str:
        """Return the sha256 of keys, sizes and labels, which identifies the samples; offsets do not enter."""
        digest = hashlib.sha256()
        for array in (self.keys, self.key_ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def compute_checksum(self) -> str:
        """Return the sha256 of metadata and arrays, to be compared with ``checksum``."""
        digest = hashlib.sha256(json.dumps(self.to_metadata(), sort_keys=True).encode())
        for name in _TENSORS:
            array = getattr(self, name)
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_metadata(self) -> dict:
        """Return the file's metadata without digest and checksum, which are computed on write."""
        return {
            "format": FORMAT_VERSION,
            "fields": self.fields,
            **{name: getattr(self, name) for name in _METADATA_FIELDS},
        }


def make_index(
    shard_file: str,
    shard_bytes: int,
    fields: Sequence[str],
    samples: Sequence[tuple[str, dict[str, tuple[int, int]], int]],
    rules: IndexRules,
    note: str = "",
) -> ShardIndex:
    """Build an index from samples (key, {field: (offset, size)}, label) that ``rules`` were applied to."""
    spans = np.full((len(samples), len(fields), 2), -1, dtype="<i8")
    columns = {name: column for column, name in enumerate(fields)}
    for row, (_, members, _) in enumerate(samples):
        for name, span in members.items():
            spans[row, columns[name]] = span
    keys = [key.encode(errors="surrogateescape") for key, _, _ in samples]
    return ShardIndex(
        shard=shard_file,
        bytes=shard_bytes,
        fields=tuple(fields),
        offsets=spans[:, :, 0].copy(),
        sizes=spans[:, :, 1].copy(),
        labels=np.array([label for _, _, label in samples], dtype="<i8"),
        key_ends=np.cumsum([len(key) for key in keys], dtype="<i8"),
        keys=np.frombuffer(b"".join(keys), dtype="u1"),
        rules=rules.to_metadata(),
        note=note,
    )


def write_index(index: ShardIndex, file: Path) -> None:
    """Write an index atomically."""
    tensors = {name: getattr(index, name) for name in _TENSORS}
    metadata = {**index.to_metadata(), "digest": index.compute_samples_digest(), "checksum": index.compute_checksum()}
    write_atomic(file, safetensors.numpy.save(tensors, {"index": json.dumps(metadata)}))


def open_index(file: Path, expected_digest: str, num_samples: int) -> ShardIndex:
    """Map the index with the digest and number of samples that the manifest states.

    Raises: DataError if the file is missing, damaged, of another format version, or not the manifest's index.
    """
    index, stored_digest = mmap_index(file)
    if stored_digest != expected_digest or len(index) != num_samples:
        raise DataError(f"{file} is not the index that manifest.json was written with: {_rerun_hint(file)}")
    return index


def verify_index(file: Path) -> None:
    """Read a complete index and verify its checksum and digest, for example after a download.

    Raises: DataError if the file is missing, of another format version, or has a changed byte.
    """
    index, stored_digest = mmap_index(file)
    if index.compute_checksum() != index.checksum or index.compute_samples_digest() != stored_digest:
        raise DataError(f"{file} is damaged, its checksum is not that of what it holds: {_rerun_hint(file)}")


def mmap_index(file: Path) -> tuple[ShardIndex, str]:
    """Map an index without expectations; return the index and its stored digest.

    Raises: DataError if the file is missing, of another format version, or its header or array shapes are damaged.
    """
    try:
        header, mapped, start = _read_header(file)
        metadata = json.loads(header["__metadata__"]["index"])
        if metadata["format"] != FORMAT_VERSION:
            raise DataError(
                f"{file} has format {metadata['format']}, this foveal reads {FORMAT_VERSION}: {_rerun_hint(file)}"
            )
        arrays = {name: _map_array(mapped, start, header[name]) for name in _TENSORS}
        values: dict[str, Any] = {name: metadata[name] for name in (*_METADATA_FIELDS, "checksum")} | arrays
        index = ShardIndex(fields=tuple(metadata["fields"]), **values)
        _check_shapes(index)
        return index, metadata["digest"]
    except FileNotFoundError:
        raise DataError(f"{file} is missing: {_rerun_hint(file)}") from None
    except OSError as error:
        if error.errno in STORAGE_AWAY_ERRNOS:
            raise
        raise DataError(f"{file} cannot be read ({error}): {_rerun_hint(file)}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} is no index of a shard ({error}): {_rerun_hint(file)}") from None


def _check_shapes(index: ShardIndex) -> None:
    """Raise ValueError unless array shapes and metadata types are consistent."""
    shapes = [getattr(index, name).shape for name in _TENSORS]
    table = (len(index.labels), len(index.fields))
    if shapes != [table, table, table[:1], table[:1], (len(index.keys),)]:
        raise ValueError(f"its arrays have the shapes {shapes}")
    if type(index.shard) is not str or type(index.bytes) is not int or type(index.note) is not str:
        raise ValueError("shard and note are text, bytes is a number")


def _rerun_hint(file: Path) -> str:
    return f"run `foveal data index {file.parent}` again"


def _read_header(file: Path) -> tuple[dict, mmap.mmap, int]:
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    return json.loads(mapped[8:start]), mapped, start


def _map_array(mapped: mmap.mmap, start: int, entry: dict) -> np.ndarray:
    count = math.prod(entry["shape"])
    array = np.frombuffer(mapped, _TYPES[entry["dtype"]], count, start + entry["data_offsets"][0])
    return array.reshape(entry["shape"])
