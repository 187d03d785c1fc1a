"""Scan of tar headers into samples; reads labels but no images, and never uses a member's name as a path."""

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from foveal.data.format.shard_index import IMAGE_EXTENSIONS, IndexRules
from foveal.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and field, split as in WebDataset
# The last dot ends the key, except before common fields of two parts (mask.png).
_DOTTED_NAME = re.compile(
    r"((?:.*/)?[^./][^/]*?)\."
    r"((?:(?:masks?|seg|segmentation|semantic|instances?|panoptic|labels?|depth|normals?|edges?|flow)\.)?[^./]+)",
    re.DOTALL | re.IGNORECASE,
)
_COMMON_FIELDS = {*IMAGE_EXTENSIONS, "cls", "json", "txt"}  # fields that show where a key with dots ends
_METADATA_NAME = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's metadata members
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
_MAX_LABEL_BYTES = 256  # read of a .cls member
_MAX_JSON_BYTES = 1 << 24  # read of a .json member
MAX_CLASSES = 1_000_000  # limit of numeric labels without class names; a larger number is probably an id
_MAX_FIELDS = 64  # limit of fields in a shard; more mean that names are split at the wrong dot
_TAIL_BYTES = 1 << 20  # bytes checked after the last member; tar pads with zeros to its block size
_BLOCK = tarfile.BLOCKSIZE


class TarSample(NamedTuple):
    """Sample of a shard: (offset, size) of its members by field, and its label (-1: none)."""

    key: str
    offset_size_by_field: dict[str, tuple[int, int]]
    label: int


class _TarMember(NamedTuple):
    """File in a tar; header_offset, data_offset and size in bytes."""

    key: str
    field: str
    header_offset: int
    data_offset: int
    size: int


def scan_tar(stream: IO[bytes], size: int, location: str, rules: IndexRules) -> tuple[list[TarSample], str]:
    """Return the samples of a tar of ``size`` bytes, in order, and a warning ('' for none).

    Consecutive members with the same key form a sample, as in WebDataset. A truncated tar yields its complete samples.
    Raises: DataError that begins with ``location`` if the file is empty, compressed, damaged or no tar, a key appears
    twice, a sample has no image, or a label is invalid.
    """
    return _TarScanner(stream, size, location, rules).samples()


class _TarScanner:
    def __init__(self, stream: IO[bytes], size: int, location: str, rules: IndexRules) -> None:
        self._stream, self._size, self._location, self._rules = stream, size, location, rules
        self._name_pattern = _DOTTED_NAME if rules.dotted_keys else _NAME
        self._labels = {name: label for label, name in enumerate(rules.classes or ())}
        self._fields: set[str] = set()
        self._truncated_at: int | None = None  # end of the complete members of a truncated tar

    def samples(self) -> tuple[list[TarSample], str]:
        self._refuse_compressed()
        samples: list[TarSample] = []
        first_offsets: dict[str, int] = {}  # header offset of every sample's first member, by key
        header_offsets: dict[str, int] = {}  # header offsets of the current sample's members, by field
        for key, field, header_offset, data_offset, size in self._members():
            if not samples or key != samples[-1].key:
                if key in first_offsets:
                    raise self._duplicate_error(
                        f"key '{key}' comes twice, with other samples between", first_offsets[key], header_offset
                    )
                first_offsets[key], header_offsets = header_offset, {}
                samples.append(TarSample(key, {}, -1))
            if field in header_offsets:
                raise self._duplicate_error(
                    f"key '{key}' has two members '.{field}'", header_offsets[field], header_offset
                )
            header_offsets[field] = header_offset
            self._fields.add(field)
            if len(self._fields) > _MAX_FIELDS:
                raise self._naming_error(f"samples have more than {_MAX_FIELDS} kinds of members")
            samples[-1].offset_size_by_field[field] = (data_offset, size)
            if field == ("cls" if self._rules.label_key is None else "json"):
                samples[-1] = samples[-1]._replace(label=self._read_label(key, field, data_offset, size))
        note = self._drop_incomplete(samples)
        for key, members, _ in samples:
            if not any(name in IMAGE_EXTENSIONS for name in members):
                raise self._naming_error(f"sample '{key}' has no image, its members are: {', '.join(members)}")
        return samples, note

    def _drop_incomplete(self, samples: list[TarSample]) -> str:
        """Remove a truncated tar's last sample if it may lack members; return the warning ('' for a complete tar)."""
        if self._truncated_at is None:
            return ""
        expected_fields = {field for sample in samples[:-1] for field in sample.offset_size_by_field}
        omission = ""
        if samples and set(samples[-1].offset_size_by_field) != expected_fields:
            omission = f", without '{samples.pop().key}', which is not known to be whole"
        return (
            f"{self._location} is cut short after byte {self._truncated_at}: its first {len(samples)} samples are "
            f"indexed{omission}; copy it again, or write it again"
        )

    def _members(self) -> Iterator[_TarMember]:
        end, error = 0, None
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or all headers stay in memory
                    if member.offset_data + member.size > self._size:
                        self._truncated_at = member.offset
                        return
                    if tar.offset <= end:  # a damaged header may state a negative size
                        raise self._damage_error(end)
                    end = tar.offset
                    match = self._name_pattern.fullmatch(member.name)
                    if not match or member.isdir() or _METADATA_NAME.search(member.name):
                        continue
                    if not member.isreg() or member.issparse():
                        raise DataError(
                            f"{self._location}: '{member.name}' is a link or no plain file: write the shard with "
                            f"`tar --dereference --hard-dereference`"
                        )
                    yield _TarMember(match[1], match[2].lower(), member.offset, member.offset_data, member.size)
        except (tarfile.TarError, ValueError) as caught:
            error = caught
        self._check_end(min(end, self._size), error)

    def _check_end(self, end: int, error: Exception | None) -> None:
        """Check the bytes after the last member: zeros are regular, a cut sets ``_truncated_at``, other bytes raise."""
        self._stream.seek(end)
        tail = self._stream.read(_TAIL_BYTES)
        if end and len(tail) < _BLOCK:
            self._truncated_at = end
        elif len(tail) < _BLOCK or tail.strip(b"\0"):
            if len(tail) < _BLOCK or not self._has_truncated_tail(end):
                raise self._damage_error(end) if end else DataError(f"{self._location} is not a tar file ({error})")
            self._truncated_at = end

    def _has_truncated_tail(self, offset: int) -> bool:
        """Whether the headers from ``offset`` are valid and the file ends before the data that they announce."""
        while offset + _BLOCK <= self._size:
            self._stream.seek(offset)
            try:
                header = tarfile.TarInfo.frombuf(self._stream.read(_BLOCK), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            offset += _BLOCK + -(-max(header.size, 0) // _BLOCK) * _BLOCK
        return True

    def _damage_error(self, offset: int) -> DataError:
        return DataError(f"{self._location} is damaged after byte {offset}: copy it again, or write it again")

    def _read_label(self, key: str, field: str, offset: int, size: int) -> int:
        self._stream.seek(offset)
        if field == "cls":
            return self._parse_label(key, self._stream.read(min(size, _MAX_LABEL_BYTES + 1)).decode(errors="replace"))
        try:
            value = json.loads(self._stream.read(min(size, _MAX_JSON_BYTES)))
            value = value.get(self._rules.label_key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{self._location}: the .json of '{key}' is no JSON object ({error})") from None
        return -1 if value is None else self._parse_label(key, value if isinstance(value, str) else json.dumps(value))

    def _parse_label(self, key: str, text: str) -> int:
        """Return the label from text: a class name if classes are given, or a number."""
        text = text.strip()
        if text in self._labels:
            return self._labels[text]
        try:
            label = int(text)
        except ValueError:
            remedy = "it is not one of --classes" if self._labels else "give the names with --classes"
            raise DataError(
                f"{self._location}: the label of '{key}' is {text[:40]!r}, not a number: {remedy}"
            ) from None
        limit = len(self._labels) or MAX_CLASSES
        if not 0 <= label < limit:
            raise DataError(f"{self._location}: the label of '{key}' is {text[:40]}, and labels are 0 to {limit - 1}")
        return label

    def _refuse_compressed(self) -> None:
        if not self._size:
            raise DataError(f"{self._location} is empty (0 bytes): delete it, or write it again")
        magic = self._stream.read(6)
        self._stream.seek(0)
        for name, prefix in _COMPRESSED.items():
            if magic.startswith(prefix):
                raise DataError(f"{self._location} is compressed ({name}), which has no random access: unpack it first")

    def _duplicate_error(self, problem: str, first: int, second: int) -> DataError:
        return self._naming_error(f"{problem} (at bytes {first} and {second})")

    def _naming_error(self, problem: str) -> DataError:
        """Return an error about members' names; suggests --dotted-keys if the fields look split at the wrong dot."""
        matches = (_DOTTED_NAME.fullmatch(f"key.{field}") for field in self._fields)
        keys_have_dots = any(match and match[1] != "key" and match[2].lower() in _COMMON_FIELDS for match in matches)
        remedy = "if keys have dots, index with --dotted-keys" if keys_have_dots else "write the shard again"
        return DataError(f"{self._location}: {problem}: {remedy}")
