"""Scan of tar headers into samples; reads labels but no images, and never uses a member's name as a path."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from foveal.data.format.image_fields import choose_image_fields, is_image_field, named_image_fields
from foveal.data.format.shard_index import IndexRules, LeftOut
from foveal.data.indexing.labels import MAX_JSON_BYTES, MAX_LABEL_BYTES, LabelParser, normalize_name
from foveal.data.indexing.naming import (
    LABEL_FIELDS,
    TarSample,
    describe_without_image,
    dotted_name_pattern,
    find_twins,
    has_common_field_behind_dot,
    has_dotted_label,
    has_key_with_dots,
    printable_key,
)
from foveal.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and field, split as in WebDataset
_METADATA_NAME = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's metadata members
_HIDDEN_NAME = re.compile(r"(^|/)(\.[^/]*$|__MACOSX/)", re.DOTALL)  # also AppleDouble files, which macOS writes
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
MAX_CLASSES = 1_000_000  # limit of numeric labels without class names; a larger number is probably an id
_MAX_FIELDS = 64  # limit of fields in a shard; more mean that names are split at the wrong dot
_TAIL_BYTES = 1 << 20  # bytes per read of what follows the last member; tar pads with zeros to its block size
_BLOCK = tarfile.BLOCKSIZE


class _TarMember(NamedTuple):
    """File in a tar; header_offset, data_offset and size in bytes."""

    key: str
    field: str
    header_offset: int
    data_offset: int
    size: int


class TarScan(NamedTuple):
    """Samples of a tar in order, a warning ('' for none), and what the tar has beside these samples."""

    samples: list[TarSample]
    note: str
    left_out: LeftOut


def scan_tar(stream: IO[bytes], size: int, location: str, rules: IndexRules) -> TarScan:
    """Return the samples of a tar of ``size`` bytes.

    Consecutive members with the same key form a sample, as in WebDataset. A truncated tar yields its complete samples.
    A sample without an image is left out. Raises: DataError that begins with ``location`` if the file is empty,
    compressed, damaged or no tar, the key of an image appears twice, the image could be one of several members, names
    are split at the wrong dot, or a label is invalid.
    """
    return _TarScanner(stream, size, location, rules).scan()


class _TarScanner:
    def __init__(self, stream: IO[bytes], size: int, location: str, rules: IndexRules) -> None:
        self._stream, self._size, self._location, self._rules = stream, size, location, rules
        self._name_pattern = dotted_name_pattern(rules.image_field) if rules.dotted_keys else _NAME
        self._label_field = "cls" if rules.label_key is None else "json"
        self._label_parser = LabelParser(location, rules.classes, rules.label_key, MAX_CLASSES, rules.numeric_labels)
        self._label_errors: dict[int, DataError] = {}  # by position of the sample, which may turn out to have no image
        self._repeats: list[tuple[str, str]] = []  # key and problem of keys and members that come twice
        self._fields: dict[str, None] = {}
        self._num_other_files = 0
        self._truncated_at: int | None = None  # end of the complete members of a truncated tar

    def scan(self) -> TarScan:
        self._refuse_compressed()
        samples = self._group_members()
        note = self._drop_incomplete(samples)
        self._refuse_repeats(samples)
        image_fields = choose_image_fields(self._fields, self._rules.image_field, order=self._rules.image_order)
        has_image = [not sample.offset_size_by_field.keys().isdisjoint(image_fields) for sample in samples]
        others = [sample for sample, has in zip(samples, has_image, strict=True) if not has]
        samples_with_image = [sample for sample, has in zip(samples, has_image, strict=True) if has]
        self._refuse_split_names(samples_with_image, others)
        if self._rules.image_field is None and "." in "".join(image_fields):
            for sample in samples_with_image:
                if has_dotted_label(sample.offset_size_by_field):
                    problem = f"the label of '{printable_key(sample.key)}' has the name of its image"
                    members = ", ".join(sample.offset_size_by_field)
                    raise self._naming_error(f"{problem}: {members}", sample.offset_size_by_field)
        for position, error in self._label_errors.items():
            if position < len(samples) and has_image[position]:
                raise error
        twins = find_twins(samples_with_image, dotted=self._rules.dotted_keys)
        left_out = LeftOut(
            samples=len(others),
            first_key=printable_key(others[0].key) if others else "",
            files=self._num_other_files,
            twins=len(twins),
            first_twin=printable_key(twins[0]) if twins else "",
        )
        if others and not samples_with_image:
            members = ", ".join(others[0].offset_size_by_field)
            note = (
                f"{self._location}: none of its {len(others):,} samples has an image, the members of "
                f"'{left_out.first_key}' are: {members}"
            )
        return TarScan(samples_with_image, note, left_out)

    def _group_members(self) -> list[TarSample]:
        samples: list[TarSample] = []
        first_offsets: dict[str, int] = {}  # header offset of every sample's first member, by key
        header_offsets: dict[str, int] = {}  # header offsets of the current sample's members, by field
        for key, field, header_offset, data_offset, size in self._members():
            if not samples or key != samples[-1].key:
                first = first_offsets.setdefault(key, header_offset)
                if first != header_offset:
                    place = f"(at bytes {first} and {header_offset})"
                    self._repeats.append((key, f"key '{key}' comes twice, with other samples between {place}"))
                header_offsets = {}
                samples.append(TarSample(key, {}, -1))
            if field in header_offsets:
                place = f"(at bytes {header_offsets[field]} and {header_offset})"
                self._repeats.append((key, f"key '{key}' has two members '.{field}' {place}"))
            header_offsets[field] = header_offset
            self._fields[field] = None
            if len(self._fields) > _MAX_FIELDS:
                raise self._naming_error(f"samples have more than {_MAX_FIELDS} kinds of members", self._fields)
            samples[-1].offset_size_by_field[field] = (data_offset, size)
            if field == self._label_field:
                try:
                    samples[-1] = samples[-1]._replace(label=self._read_label(key, field, data_offset, size))
                except DataError as error:
                    self._label_errors[len(samples) - 1] = error
        return samples

    def _refuse_repeats(self, samples: list[TarSample]) -> None:
        """Refuse a key or member that comes twice; only files without an image, such as a README, may."""
        if self._repeats:
            fields = {
                sample.key: sample.offset_size_by_field
                for sample in reversed(samples)
                if any(map(is_image_field, sample.offset_size_by_field))
            }
            for key, problem in self._repeats:
                if key in fields:
                    raise self._naming_error(problem, fields[key])

    def _refuse_split_names(self, samples: list[TarSample], others: list[TarSample]) -> None:
        """Refuse ``others``, which have no image, where names are split at the wrong dot or the image is ambiguous."""
        if others and not samples and self._rules.image_field is None:
            for sample in others:
                if named_image_fields(sample.offset_size_by_field):
                    raise self._naming_error(
                        describe_without_image(sample), sample.offset_size_by_field, names_image=True
                    )
        stems = {sample.key.rpartition(".")[0] for sample in samples} if self._rules.dotted_keys else set()
        keys: set[str] = set()
        if any(not sample.key.isascii() for sample in others):
            keys = {normalize_name(sample.key) for sample in samples}
        folders = {sample.key.rpartition("/")[0] for sample in samples} if others else set()
        names = {sample.key.rpartition("/")[2] for sample in samples} if others else set()
        for sample in others:
            if sample.key in stems:
                self._refuse_dotted_key(sample, samples)
            folder, _, name = sample.key.rpartition("/")
            if (
                folder not in folders
                and name in names
                and not sample.offset_size_by_field.keys().isdisjoint(LABEL_FIELDS)
            ):
                raise DataError(
                    f"{self._location}: {describe_without_image(sample)}, and the image of that name is in another folder: write the "
                    f"shard again with the members of a sample under one key"
                )
            if self._rules.image_field is None and has_key_with_dots(sample.offset_size_by_field):
                raise self._naming_error(describe_without_image(sample), sample.offset_size_by_field, names_image=True)
            if normalize_name(sample.key) in keys:
                raise DataError(
                    f"{self._location}: {describe_without_image(sample)}, and its key is that of another sample in another Unicode "
                    f"form (NFC, NFD): write the shard again with one form"
                )

    def _refuse_dotted_key(self, sample: TarSample, samples: list[TarSample]) -> None:
        """Refuse a sample without an image if the image is under its key with a name, as in KEY.input.jpg + KEY.cls."""
        for other in samples:
            stem, _, name = other.key.rpartition(".")
            if stem == sample.key and other.offset_size_by_field.keys().isdisjoint(LABEL_FIELDS):
                extension = next(field for field in other.offset_size_by_field if is_image_field(field))
                raise DataError(
                    f"{self._location}: {describe_without_image(sample)}, and '{printable_key(other.key)}' is a sample of its own: index "
                    f"without --dotted-keys and with --image-field {name.lower()}.{extension}"
                )

    def _drop_incomplete(self, samples: list[TarSample]) -> str:
        """Remove a truncated tar's last sample if it may lack members; return the warning ('' for a complete tar)."""
        if self._truncated_at is None:
            return ""
        expected_fields = {
            field
            for sample in samples[:-1]
            if any(map(is_image_field, sample.offset_size_by_field))
            for field in sample.offset_size_by_field
        }
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
                    if member.issparse():  # its size is that of the file with its holes
                        raise DataError(
                            f"{self._location}: '{member.name}' is stored as a sparse file: write the shard again with tar "
                            f"without --sparse (-S)"
                        )
                    if member.offset_data + member.size > self._size:
                        self._truncated_at = member.offset
                        return
                    if tar.offset <= end:  # a damaged header may state a negative size
                        raise self._damage_error(end)
                    end = tar.offset
                    match = self._name_pattern.fullmatch(member.name)
                    if member.isdir() or _METADATA_NAME.search(member.name):
                        continue
                    if not match or _HIDDEN_NAME.search(member.name):
                        self._num_other_files += 1
                        continue
                    if not member.isreg():
                        raise DataError(
                            f"{self._location}: '{member.name}' is a link or no plain file: write the shard with "
                            f"`tar --dereference --hard-dereference`"
                        )
                    yield _TarMember(match[1], match[2].lower(), member.offset, member.offset_data, member.size)
        except (tarfile.TarError, ValueError) as caught:
            error = caught
        self._check_end(min(end, self._size), error)

    def _check_end(self, end: int, error: Exception | None) -> None:
        """Check the bytes after the last member: zeros are regular, a cut sets ``_truncated_at``, other bytes raise.

        Zeros are read up to the end: behind them may be another archive, or what a download with a hole holds.
        """
        first_byte, has_block = self._find_nonzero(end), self._size - end >= _BLOCK
        if end and not has_block:
            self._truncated_at = end
        elif not has_block or first_byte is not None:
            if first_byte is not None and first_byte >= end + _BLOCK and self._read_header(first_byte):
                raise DataError(
                    f"{self._location} holds several archives, the second from byte {first_byte}, as `cat` joins them: read "
                    f"them with `tar --ignore-zeros --extract` and write one shard, or keep each as a shard of its own"
                )
            if not has_block or not self._has_truncated_tail(end):
                raise self._damage_error(end) if end else DataError(f"{self._location} is not a tar file ({error})")
            self._truncated_at = end

    def _find_nonzero(self, offset: int) -> int | None:
        """Return the place of the first byte from ``offset`` that is not zero; None if there is none."""
        self._stream.seek(offset)
        while block := self._stream.read(_TAIL_BYTES):
            if rest := block.lstrip(b"\0"):
                return offset + len(block) - len(rest)
            offset += len(block)
        return None

    def _read_header(self, offset: int) -> tarfile.TarInfo | None:
        """Return the header of a member at ``offset``, or None if none is there."""
        self._stream.seek(offset)
        try:
            return tarfile.TarInfo.frombuf(self._stream.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None

    def _has_truncated_tail(self, offset: int) -> bool:
        """Whether the headers from ``offset`` are valid and the file ends before the data that they announce."""
        while offset + _BLOCK <= self._size:
            if (header := self._read_header(offset)) is None:
                return False
            offset += _BLOCK + -(-max(header.size, 0) // _BLOCK) * _BLOCK
        return True

    def _damage_error(self, offset: int) -> DataError:
        return DataError(f"{self._location} is damaged after byte {offset}: copy it again, or write it again")

    def _read_label(self, key: str, field: str, offset: int, size: int) -> int:
        self._stream.seek(offset)
        if field == "cls":
            return self._label_parser.parse_cls(key, self._stream.read(min(size, MAX_LABEL_BYTES + 1)))
        return self._label_parser.parse_json(key, self._stream.read(min(size, MAX_JSON_BYTES)))

    def _refuse_compressed(self) -> None:
        if not self._size:
            raise DataError(f"{self._location} is empty (0 bytes): delete it, or write it again")
        magic = self._stream.read(6)
        self._stream.seek(0)
        for name, prefix in _COMPRESSED.items():
            if magic.startswith(prefix):
                raise DataError(f"{self._location} is compressed ({name}), which has no random access: unpack it first")

    def _naming_error(self, problem: str, fields: Iterable[str], *, names_image: bool = False) -> DataError:
        """Return an error about members' names, with the options that would read them.

        fields: those of the sample, or of the shard. names_image: whether naming the image is a remedy.
        """
        fields, remedies = list(fields), []
        keys_may_have_dots = has_dotted_label(fields) or set(fields).isdisjoint(LABEL_FIELDS)
        if not self._rules.dotted_keys and has_common_field_behind_dot(fields) and keys_may_have_dots:
            remedies.append("if keys have dots, index with --dotted-keys")
        named = named_image_fields(fields)
        if names_image and named and not (remedies and has_key_with_dots(fields)):
            remedies.append(f"say which member is the image, for example with --image-field {named[0]}")
        return DataError(f"{self._location}: {problem}: {', or '.join(remedies) or 'write the shard again'}")
