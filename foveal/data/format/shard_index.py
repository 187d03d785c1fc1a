"""The index of one shard: where each sample's members lie in the tar, and its label.

A file `<shard>.index` is a safetensors file of offsets and sizes int64 [n, F] (size -1: the sample has no such member),
labels int64 [n] (-1: none), key_ends int64 [n] and keys uint8. Its metadata is one JSON text: safetensors writes
several entries in an order that changes from run to run, and the same shard must give the same file.
It is mapped, not read: safetensors' own reader copies on every access, too slow for a look-up per sample.
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
IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "ppm",
    "pgm",
    "tif",
    "tiff",
    "gif",
)  # members that are the image, by preference

_METADATA_FIELDS = ("shard", "bytes", "rules", "note")
_TENSORS = ("offsets", "sizes", "labels", "key_ends", "keys")
_TYPES = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class IndexRules:
    """How members become samples with labels.

    classes: turn names into labels, and bound the numbers; label_key: the entry of `.json` members that is the label,
    without it `.cls` members are; dotted_keys: a key ends at the last dot of a name and not at the first.
    """

    classes: tuple[str, ...] | None = None
    label_key: str | None = None
    dotted_keys: bool = False

    def to_metadata(self) -> dict[str, str | bool | None]:
        """What an index remembers of the rules that it was made by: of thousands of class names, a digest."""
        names = None if self.classes is None else hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()
        return {"classes": names, "label_key": self.label_key, "dotted_keys": self.dotted_keys}


@dataclass(frozen=True)
class ShardIndex:
    """n samples of one shard with F kinds of members; arrays as in the file.

    note: what was not as it should be, such as a shard that is cut short; checksum: of all of this, as the file says.
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
        """The name of a sample in its shard."""
        start = self.key_ends[row - 1] if row else 0
        return bytes(self.keys[start : self.key_ends[row]]).decode(errors="backslashreplace")

    def find_image(self, row: int) -> tuple[int, int]:
        """Offset and size, in bytes, of a sample's image in the shard."""
        for name in IMAGE_EXTENSIONS:
            if (place := self.find_member(row, name)) is not None:
                return place
        raise DataError(
            f"{self.shard}: sample '{self.key(row)}' has no image (looked for: {', '.join(IMAGE_EXTENSIONS)})"
        )

    def find_member(self, row: int, field_name: str) -> tuple[int, int] | None:
        """Offset and size, in bytes, of a sample's member in the shard; nothing if it has none of this name."""
        if field_name not in self.fields:
            return None
        column = self.fields.index(field_name)
        size = int(self.sizes[row, column])
        if size < 0:
            return None
        offset = int(self.offsets[row, column])
        if not 0 <= offset <= self.bytes - size:
            raise DataError(
                f"{self.shard}: the index has '{self.key(row)}.{field_name}' at byte {offset}, outside of the shard: run `foveal "
                f"data index` on its folder again"
            )
        return offset, size

    def compute_digest(self) -> str:
        """sha256 of keys, sizes and labels: what the samples are, not where they lie."""
        digest = hashlib.sha256()
        for array in (self.keys, self.key_ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def compute_checksum(self) -> str:
        """sha256 of everything in the index, to be compared with ``checksum``."""
        digest = hashlib.sha256(json.dumps(self.to_metadata(), sort_keys=True).encode())
        for name in _TENSORS:
            array = getattr(self, name)
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_metadata(self) -> dict:
        """What the file says beside the arrays, but for digest and checksum, which are computed."""
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
    """An index from samples given as (key, {field: (offset, size)}, label), found by these rules."""
    places = np.full((len(samples), len(fields), 2), -1, dtype="<i8")
    columns = {name: column for column, name in enumerate(fields)}
    for row, (_, found, _) in enumerate(samples):
        for name, place in found.items():
            places[row, columns[name]] = place
    names = [key.encode(errors="surrogateescape") for key, _, _ in samples]
    return ShardIndex(
        shard=shard_file,
        bytes=shard_bytes,
        fields=tuple(fields),
        offsets=places[:, :, 0].copy(),
        sizes=places[:, :, 1].copy(),
        labels=np.array([label for _, _, label in samples], dtype="<i8"),
        key_ends=np.cumsum([len(name) for name in names], dtype="<i8"),
        keys=np.frombuffer(b"".join(names), dtype="u1"),
        rules=rules.to_metadata(),
        note=note,
    )


def write_index(index: ShardIndex, file: Path) -> None:
    """Write an index; the file appears whole or not at all."""
    tensors = {name: getattr(index, name) for name in _TENSORS}
    about = {**index.to_metadata(), "digest": index.compute_digest(), "checksum": index.compute_checksum()}
    write_atomic(file, safetensors.numpy.save(tensors, {"index": json.dumps(about)}))


def open_index(file: Path, digest: str, num_samples: int) -> ShardIndex:
    """Map an index whose digest and number of samples the manifest knows.

    Raises: DataError if it is missing, of another format, damaged, or not the one that the manifest was written with.
    """
    index, written = mmap_index(file)
    if written != digest or len(index) != num_samples:
        raise DataError(f"{file} is not the index that manifest.json was written with: {_rerun_hint(file)}")
    return index


def verify_index(file: Path) -> None:
    """Read an index from end to end, as is due to one that came from elsewhere.

    Raises: DataError if it is missing, of another format, or has a byte that is not as it was written.
    """
    index, written = mmap_index(file)
    if index.compute_checksum() != index.checksum or index.compute_digest() != written:
        raise DataError(f"{file} is damaged, its checksum is not that of what it holds: {_rerun_hint(file)}")


def mmap_index(file: Path) -> tuple[ShardIndex, str]:
    """Map an index that nothing is known of; also the digest that it says it has.

    Raises: DataError if it is missing, of another format or damaged where that shows at a glance.
    """
    try:
        header, mapped, start = _read_header(file)
        about = json.loads(header["__metadata__"]["index"])
        if about["format"] != FORMAT_VERSION:
            raise DataError(
                f"{file} has format {about['format']}, this foveal reads {FORMAT_VERSION}: {_rerun_hint(file)}"
            )
        arrays = {name: _map_array(mapped, start, header[name]) for name in _TENSORS}
        known: dict[str, Any] = {name: about[name] for name in (*_METADATA_FIELDS, "checksum")} | arrays
        index = ShardIndex(fields=tuple(about["fields"]), **known)
        _check_shapes(index)
        return index, about["digest"]
    except FileNotFoundError:
        raise DataError(f"{file} is missing: {_rerun_hint(file)}") from None
    except OSError as error:
        if error.errno in STORAGE_AWAY_ERRNOS:
            raise
        raise DataError(f"{file} cannot be read ({error}): {_rerun_hint(file)}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} is no index of a shard ({error}): {_rerun_hint(file)}") from None


def _check_shapes(index: ShardIndex) -> None:
    """Whether the arrays of an index are of the samples and fields that it has. Raises: ValueError."""
    shapes = [getattr(index, name).shape for name in _TENSORS]
    places = (len(index.labels), len(index.fields))
    if shapes != [places, places, places[:1], places[:1], (len(index.keys),)]:
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
