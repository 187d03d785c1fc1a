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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from foveal.atomic import write_atomic
from foveal.data.format.image_fields import IMAGE_EXTENSIONS, IMAGE_ORDER, choose_image_fields, named_image_fields
from foveal.errors import DataError
from foveal.timeouts import STORAGE_AWAY_ERRNOS

FORMAT_VERSION = 2
INDEX_SUFFIX = ".index"

_METADATA_FIELDS = ("shard", "bytes", "rules", "note")
_TENSORS = ("offsets", "sizes", "labels", "key_ends", "keys")
_TYPES = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class IndexRules:
    """Rules that turn the members of a tar into labelled samples.

    classes: class names, by label; numeric labels must be below their number. label_key: key of the label in `.json`
    members (None: the label is the `.cls` member). dotted_keys: the sample key ends at the last dot of a member's
    name, not at the first. image_field, image_order: as in ``choose_image_fields``. numeric_labels: where class names are
    numbers, whether a number is one of the "names" or of the "positions" (None: they agree; or, in indices of 0.1, a
    name if there is one, else a position).
    """

    classes: tuple[str, ...] | None = None
    label_key: str | None = None
    dotted_keys: bool = False
    image_field: str | None = None
    image_order: int = IMAGE_ORDER
    numeric_labels: str | None = None

    def to_metadata(self) -> dict[str, str | bool | None]:
        """Return the rules as index metadata; class names, of which there may be thousands, are stored as a sha256.

        A rule that 0.1 did not have is absent where it is not used, so that indices made before stay valid. The order
        of preference is no part of them: each index states its own.
        """
        names = None if self.classes is None else hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()
        added = {"image_field": self.image_field, "numeric_labels": self.numeric_labels}
        used = {name: value for name, value in added.items() if value is not None}
        return {"classes": names, "label_key": self.label_key, "dotted_keys": self.dotted_keys, **used}


@dataclass(frozen=True)
class LeftOut:
    """What a shard has beside the samples of its index, and what may be no sample.

    samples: number of samples without an image; first_key: key of the first of them. files: number of files that belong
    to no sample, because they are hidden or have no extension. twins: number of samples whose key is that of another
    sample with a further name or in a folder of labels; first_twin: key of the first of them.
    """

    samples: int = 0
    first_key: str = ""
    files: int = 0
    twins: int = 0
    first_twin: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """Index of n samples with F fields; arrays as in the file.

    bytes: size of the shard. note: warning about the shard, such as a truncated tar. checksum: ``compute_checksum()``
    when the file was written. left_out: members of the shard that no sample has. shard_version: modification time or ETag
    of the shard when it was read ('': unknown); no part of the checksum, because it says nothing about the samples.
    image_order: as in ``IndexRules``; 1, as in indices of 0.1, unless another order chooses other images.
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
    left_out: LeftOut = LeftOut()
    image_order: int = 1
    shard_version: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        start = self.key_ends[row - 1] if row else 0
        return bytes(self.keys[start : self.key_ends[row]]).decode(errors="backslashreplace")

    @property
    def image_field(self) -> str | None:
        """The ``image_field`` of the rules."""
        field_name = self.rules.get("image_field")
        return field_name if isinstance(field_name, str) else None

    def image_fields(self, label_field: str | None = None) -> tuple[str, ...]:
        """Return the fields that hold images, by preference; ``label_field``, that of the label, is none of them."""
        return choose_image_fields(self.fields, self.image_field, label_field, order=self.image_order)

    def find_image_offset_size(self, row: int, label_field: str | None = None) -> tuple[int, int]:
        """Return offset and size, in bytes, of a sample's image, which is never the member ``label_field``.

        Raises: DataError if the sample has no image.
        """
        image_fields = self.image_fields(label_field)
        for name in image_fields:
            if (span := self.find_member_offset_size(row, name)) is not None:
                return span
        beside, remedy = "", ""
        if label_field is not None:
            beside, remedy = f" beside its label .{label_field}", "correct data.label_field, "
        raise DataError(
            f"{self.shard}: sample '{self.key(row)}' has no image{beside} (looked for: "
            f"{', '.join(image_fields or IMAGE_EXTENSIONS)}): {remedy}index its folder again with --image-field, or write "
            f"the shard again"
        )

    def count_images(self) -> np.ndarray:
        """Return how many members of each sample may be its image, int64 [n]."""
        columns = [self.fields.index(name) for name in self.candidate_image_fields()]
        return (self.sizes[:, columns] >= 0).sum(axis=1)

    def candidate_image_fields(self) -> tuple[str, ...]:
        """Return ``image_fields`` and, unless the rules name the image, the fields that may be meant instead."""
        named = named_image_fields(self.fields) if self.image_field is None else []
        return tuple(dict.fromkeys((*self.image_fields(), *named)))

    def _image_columns(self, image_fields: Sequence[str]) -> np.ndarray:
        """Return the column of each sample's first member of ``image_fields``, int64 [n], -1 for none."""
        result = np.full(len(self), -1)
        for name in reversed(image_fields):
            column = self.fields.index(name)
            result[self.sizes[:, column] >= 0] = column
        return result

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
        """Return the sha256 of keys, sizes and labels, which identifies the samples; offsets do not enter.

        The fields of the images enter where they are not those that 0.1 would choose.
        """
        digest = hashlib.sha256()
        for array in (self.keys, self.key_ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.chooses_other_images_than(image_field=None, image_order=1):
            digest.update(",".join(self.image_fields()).encode())
        return digest.hexdigest()

    def chooses_other_images_than(self, image_field: str | None, image_order: int) -> bool:
        """Whether another ``image_field`` and ``image_order`` would give a sample another image."""
        if (self.image_field, self.image_order) == (image_field, image_order):
            return False
        others = choose_image_fields(self.fields, image_field, order=image_order)
        return not np.array_equal(self._image_columns(self.image_fields()), self._image_columns(others))

    def compute_checksum(self) -> str:
        """Return the sha256 of metadata and arrays, to be compared with ``checksum``."""
        digest = hashlib.sha256(json.dumps(self.to_metadata(), sort_keys=True).encode())
        for name in _TENSORS:
            array = getattr(self, name)
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_metadata(self) -> dict:
        """Return the metadata that the checksum covers: without digest, checksum and the shard's version."""
        return {
            "format": FORMAT_VERSION,
            "fields": self.fields,
            **{name: getattr(self, name) for name in _METADATA_FIELDS},
            **({} if self.left_out == LeftOut() else {"left_out": asdict(self.left_out)}),
            **({} if self.image_order == 1 else {"image_order": self.image_order}),
        }


def make_index(
    shard_file: str,
    shard_bytes: int,
    fields: Sequence[str],
    samples: Sequence[tuple[str, dict[str, tuple[int, int]], int]],
    rules: IndexRules,
    note: str = "",
    left_out: LeftOut | None = None,
) -> ShardIndex:
    """Build an index from samples (key, {field: (offset, size)}, label) that ``rules`` were applied to."""
    spans = np.full((len(samples), len(fields), 2), -1, dtype="<i8")
    columns = {name: column for column, name in enumerate(fields)}
    for row, (_, members, _) in enumerate(samples):
        for name, span in members.items():
            spans[row, columns[name]] = span
    keys = [key.encode(errors="surrogateescape") for key, _, _ in samples]
    index = ShardIndex(
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
        left_out=left_out or LeftOut(),
        image_order=rules.image_order,
    )
    return index if index.chooses_other_images_than(rules.image_field, 1) else replace(index, image_order=1)


def write_index(index: ShardIndex, file: Path) -> None:
    """Write an index atomically."""
    tensors = {name: getattr(index, name) for name in _TENSORS}
    metadata = {**index.to_metadata(), "digest": index.compute_samples_digest(), "checksum": index.compute_checksum()}
    metadata |= {"shard_version": index.shard_version} if index.shard_version else {}
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
        values |= {"left_out": LeftOut(**metadata.get("left_out", {})), "image_order": metadata.get("image_order", 1)}
        values["shard_version"] = metadata.get("shard_version", "")
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
    if type(index.shard_version) is not str:
        raise ValueError("shard_version is text")
    left_out = index.left_out
    values = (left_out.samples, left_out.first_key, left_out.files, left_out.twins, left_out.first_twin)
    if tuple(map(type, values)) != (int, str, int, int, str):
        raise ValueError("left_out has numbers and keys")
    if type(index.image_order) is not int or not 1 <= index.image_order <= IMAGE_ORDER:
        raise ValueError("image_order is a version")


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
