"""From the headers of a tar to samples: a walk that never reads an image. Names are data here, never paths."""

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from foveal.data.format.shard_index import IMAGE_EXTENSIONS, IndexRules
from foveal.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and field, as WebDataset splits them
# The last dot ends the key, but for fields of two parts that are common.
_DOTTED_NAME = re.compile(
    r"((?:.*/)?[^./][^/]*?)\."
    r"((?:(?:masks?|seg|segmentation|semantic|instances?|panoptic|labels?|depth|normals?|edges?|flow)\.)?[^./]+)",
    re.DOTALL | re.IGNORECASE,
)
_ENDINGS = {*IMAGE_EXTENSIONS, "cls", "json", "txt"}  # fields that show where a key with dots ends
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's own notes
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
_LONGEST_LABEL = 256  # bytes of a .cls member
_LONGEST_JSON = 1 << 24
MAX_CLASSES = 1_000_000  # where labels are numbers without names; a larger one is no class but an id of something
_MOST_FIELDS = 64  # kinds of members in a shard; more mean that names are split in the wrong place
_END = 1 << 20  # bytes looked at after the last member; tar pads with zeros to its block size
_BLOCK = tarfile.BLOCKSIZE


class TarSample(NamedTuple):
    """One sample of a shard: its members' (offset, size) by field, and its label, -1 if it has none."""

    key: str
    members: dict[str, tuple[int, int]]
    label: int


class _TarMember(NamedTuple):
    """One file in a tar; header: where its header begins, data: where its bytes do."""

    key: str
    field: str
    header: int
    data: int
    size: int


def scan_tar(stream: IO[bytes], size: int, location: str, rules: IndexRules) -> tuple[list[TarSample], str]:
    """The samples of a tar of ``size`` bytes in their order, and what is to be said about it ('' for nothing).

    Neighbouring members with one key are one sample, as in WebDataset. Of a tar that is cut short come the samples
    that are whole. Raises: DataError in one sentence, which begins with ``where``, for a file that is empty,
    compressed, damaged or no tar, and for a key that comes twice, a sample without an image, a label that is none.
    """
    return _TarScanner(stream, size, location, rules).samples()


class _TarScanner:
    def __init__(self, stream: IO[bytes], size: int, where: str, rules: IndexRules) -> None:
        self._stream, self._size, self._where, self._rules = stream, size, where, rules
        self._name = _DOTTED_NAME if rules.dotted_keys else _NAME
        self._labels = {name: label for label, name in enumerate(rules.classes or ())}
        self._fields: set[str] = set()
        self._cut: int | None = None  # where a tar that is cut short stops being whole

    def samples(self) -> tuple[list[TarSample], str]:
        self._refuse_compressed()
        found: list[TarSample] = []
        places: dict[str, int] = {}
        headers: dict[str, int] = {}  # of the sample that is being put together
        for key, field, header, data, size in self._members():
            if not found or key != found[-1].key:
                if key in places:
                    raise self._duplicate_error(
                        f"key '{key}' comes twice, with other samples between", places[key], header
                    )
                places[key], headers = header, {}
                found.append(TarSample(key, {}, -1))
            if field in headers:
                raise self._duplicate_error(f"key '{key}' has two members '.{field}'", headers[field], header)
            headers[field] = header
            self._fields.add(field)
            if len(self._fields) > _MOST_FIELDS:
                raise self._naming_error(f"samples have more than {_MOST_FIELDS} kinds of members")
            found[-1].members[field] = (data, size)
            if field == ("cls" if self._rules.label_key is None else "json"):
                found[-1] = found[-1]._replace(label=self._read_label(key, field, data, size))
        note = self._drop_incomplete(found)
        for key, members, _ in found:
            if not any(name in IMAGE_EXTENSIONS for name in members):
                listed = ", ".join(members)
                raise self._naming_error(f"sample '{key}' has no image, its members are: {listed}")
        return found, note

    def _drop_incomplete(self, found: list[TarSample]) -> str:
        """Leave out a last sample that may miss members, and say so."""
        if self._cut is None:
            return ""
        others = {field for sample in found[:-1] for field in sample.members}
        lost = ""
        if found and set(found[-1].members) != others:
            lost = f", without '{found.pop().key}', which is not known to be whole"
        return (
            f"{self._where} is cut short after byte {self._cut}: its first {len(found)} samples are indexed{lost}; "
            f"copy it again, or write it again"
        )

    def _members(self) -> Iterator[_TarMember]:
        end, error = 0, None
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or all headers stay in memory
                    if member.offset_data + member.size > self._size:
                        self._cut = member.offset
                        return
                    if tar.offset <= end:  # a header may claim to hold less than nothing
                        raise self._damage_error(end)
                    end = tar.offset
                    found = self._name.fullmatch(member.name)
                    if not found or member.isdir() or _META.search(member.name):
                        continue
                    if not member.isreg() or member.issparse():
                        raise DataError(
                            f"{self._where}: '{member.name}' is a link or no plain file: write the shard with "
                            f"`tar --dereference --hard-dereference`"
                        )
                    yield _TarMember(found[1], found[2].lower(), member.offset, member.offset_data, member.size)
        except (tarfile.TarError, ValueError) as caught:
            error = caught
        self._check_end(min(end, self._size), error)

    def _check_end(self, end: int, error: Exception | None) -> None:
        """See whether the tar ends with zeros, as it should, is cut short, or goes on with something unreadable."""
        self._stream.seek(end)
        rest = self._stream.read(_END)
        if end and len(rest) < _BLOCK:
            self._cut = end
        elif len(rest) < _BLOCK or rest.strip(b"\0"):
            if len(rest) < _BLOCK or not self._has_truncated_tail(end):
                raise self._damage_error(end) if end else DataError(f"{self._where} is not a tar file ({error})")
            self._cut = end

    def _has_truncated_tail(self, at: int) -> bool:
        """Whether headers from a byte on are sound, and the file ends before what they announce."""
        while at + _BLOCK <= self._size:
            self._stream.seek(at)
            try:
                header = tarfile.TarInfo.frombuf(self._stream.read(_BLOCK), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            at += _BLOCK + -(-max(header.size, 0) // _BLOCK) * _BLOCK
        return True

    def _damage_error(self, at: int) -> DataError:
        return DataError(f"{self._where} is damaged after byte {at}: copy it again, or write it again")

    def _read_label(self, key: str, field: str, data: int, size: int) -> int:
        self._stream.seek(data)
        if field == "cls":
            return self._parse_label(key, self._stream.read(min(size, _LONGEST_LABEL + 1)).decode(errors="replace"))
        try:
            value = json.loads(self._stream.read(min(size, _LONGEST_JSON)))
            value = value.get(self._rules.label_key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{self._where}: the .json of '{key}' is no JSON object ({error})") from None
        return -1 if value is None else self._parse_label(key, value if isinstance(value, str) else json.dumps(value))

    def _parse_label(self, key: str, text: str) -> int:
        """A label from text: a number, or the name of a class if names are given."""
        text = text.strip()
        if text in self._labels:
            return self._labels[text]
        try:
            label = int(text)
        except ValueError:
            remedy = "it is not one of --classes" if self._labels else "give the names with --classes"
            raise DataError(f"{self._where}: the label of '{key}' is {text[:40]!r}, not a number: {remedy}") from None
        limit = len(self._labels) or MAX_CLASSES
        if not 0 <= label < limit:
            raise DataError(f"{self._where}: the label of '{key}' is {text[:40]}, and labels are 0 to {limit - 1}")
        return label

    def _refuse_compressed(self) -> None:
        if not self._size:
            raise DataError(f"{self._where} is empty (0 bytes): delete it, or write it again")
        magic = self._stream.read(6)
        self._stream.seek(0)
        for name, start in _COMPRESSED.items():
            if magic.startswith(start):
                raise DataError(f"{self._where} is compressed ({name}), which has no random access: unpack it first")

    def _duplicate_error(self, what: str, first: int, second: int) -> DataError:
        return self._naming_error(f"{what} (at bytes {first} and {second})")

    def _naming_error(self, what: str) -> DataError:
        """A mistake in the names, which may be one of how they are split into keys and fields."""
        dotted = (_DOTTED_NAME.fullmatch(f"key.{field}") for field in self._fields)
        keys_have_dots = any(found and found[1] != "key" and found[2].lower() in _ENDINGS for found in dotted)
        remedy = "if keys have dots, index with --dotted-keys" if keys_have_dots else "write the shard again"
        return DataError(f"{self._where}: {what}: {remedy}")
