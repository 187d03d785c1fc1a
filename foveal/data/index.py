"""Indices for shards that others wrote: a walk over tar headers that never reads an image."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from foveal.data.config import is_remote
from foveal.data.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from foveal.data.reader import file_sizes, remote_folder
from foveal.data.shardindex import IMAGES, ShardIndex, make_index, write_index
from foveal.errors import DataError

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and field, as WebDataset splits them
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's own notes
_SPLIT = re.compile(r"(.*?)[-_.]?(\d*)\.tar")  # train-000012.tar: split 'train', number 12
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
_LONGEST_LABEL = 256  # bytes of a .cls member
_END = 1 << 20  # bytes looked at after the last member; tar pads with zeros to its block size

Member = tuple[str, dict[str, tuple[int, int]], int]  # key, {field: (offset, size)}, label


def index_folder(
    folder: str, index: Path | None = None, *, classes: Sequence[str] | None = None, name: str | None = None
) -> Manifest:
    """Index every shard of a folder or URL, grouped into splits by name, and write manifest.json last.

    index: where to write, default beside the shards; classes: their names, by label (default: the labels as digits).
    Pixel statistics and class names of a manifest that is there already stay if the samples are still the same.
    Errors: DataError in one sentence for shards that are missing, compressed, empty, damaged, or hold a key twice.
    """
    if index is None and is_remote(folder):
        raise DataError(f"{folder} is a URL: say with --index FOLDER where its index is to be written")
    index = Path(folder) if index is None else index
    groups = _splits(folder)
    try:
        index.mkdir(parents=True, exist_ok=True)
        splits, indices = {}, []
        for split, files in groups.items():
            walked = []
            for file in files:
                walked.append(index_shard(folder, file, classes))
                write_index(walked[-1], index / f"{file}.index")
            indices += walked
            splits[split] = describe(walked)
        manifest = _described(folder, index, splits, indices, classes, name)
        write_manifest(manifest, index)
    except OSError as error:
        raise DataError(
            f"{index}: an index cannot be written here ({error}); say with --index FOLDER where it can"
        ) from None
    return manifest


def describe(indices: Sequence[ShardIndex], sha256: Sequence[str] | None = None) -> Split:
    """The manifest's entry of a split whose shards have these indices."""
    hashes = sha256 or [None] * len(indices)
    shards = tuple(
        Shard(file=index.shard, samples=len(index), bytes=index.bytes, sha256=known, index=index.digest())
        for index, known in zip(indices, hashes, strict=True)
    )
    return Split(samples=sum(len(index) for index in indices), shards=shards)


def fields_of(indices: Sequence[ShardIndex]) -> tuple[str, ...]:
    """The kinds of members in any of the shards, as they first appear."""
    return tuple(dict.fromkeys(name for index in indices for name in index.fields))


def index_shard(folder: str, file: str, classes: Sequence[str] | None = None) -> ShardIndex:
    """The index of one shard. ``classes`` turns names in `.cls` members into labels and bounds the numbers.

    Errors: as ``index_folder``.
    """
    where = f"{folder}/{file}"
    try:
        with _opened(folder, file) as (stream, size):
            members = list(_samples(where, stream, size, classes))
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error})") from None
    if not members:
        raise DataError(f"{where} holds no samples: delete it, or write it again")
    for key, found, _ in members:
        if not any(name in IMAGES for name in found):
            raise DataError(f"{where}: sample '{key}' has no image, its members are: {', '.join(found)}")
    fields = tuple(dict.fromkeys(name for _, found, _ in members for name in found))
    return make_index(file, size, fields, members)


def _splits(folder: str) -> dict[str, list[str]]:
    """Shards by split, in the order of their numbers.

    Errors: DataError if there are none or if one is compressed and not unpacked beside.
    """
    try:
        names = sorted(file_sizes(folder))
    except OSError as error:
        raise DataError(f"{folder}: no folder of shards ({error})") from None
    for name in names:
        compressed = re.fullmatch(r"(.*\.tar)\.\w+|(.*)\.tgz", name)
        plain = compressed and (compressed[1] or f"{compressed[2]}.tar")
        if plain and not name.endswith(".index") and plain not in names:
            raise DataError(
                f"{folder}/{name} is compressed, which has no random access: unpack it to {plain} and index again"
            )
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if found := _SPLIT.fullmatch(name):
            groups.setdefault(found[1] or "train", []).append((int(found[2] or 0), name))
    if not groups:
        raise DataError(f"{folder}: no shards (*.tar) here")
    return {split: [name for _, name in sorted(found)] for split, found in groups.items()}


@contextmanager
def _opened(folder: str, file: str) -> Iterator[tuple[IO[bytes], int]]:
    """A shard and its size in bytes, at its start."""
    where = f"{folder}/{file}"
    if is_remote(folder):
        filesystem, root = remote_folder(folder)
        stream = filesystem.open(f"{root}/{file}", "rb")
    else:
        stream = Path(folder, file).open("rb")  # noqa: SIM115 - the `with` below closes it, whichever it is
    with stream:
        magic = stream.read(6)
        if not magic:
            raise DataError(f"{where} is empty (0 bytes): delete it, or write it again")
        for name, start in _COMPRESSED.items():
            if magic.startswith(start):
                raise DataError(f"{where} is compressed ({name}), which has no random access: unpack it first")
        size = stream.seek(0, 2)
        stream.seek(0)
        yield stream, size


def _samples(where: str, stream: IO[bytes], size: int, classes: Sequence[str] | None) -> Iterator[Member]:
    """Neighbouring members with one key are one sample, as in WebDataset."""
    seen: set[str] = set()
    current: Member | None = None
    for key, name, offset, length in _members(where, stream, size):
        if current is None or key != current[0]:
            if key in seen:
                raise DataError(f"{where}: key '{key}' comes twice, with other samples between: write the shard again")
            if current:
                yield current
            seen.add(key)
            current = (key, {}, -1)
        if name in current[1]:
            raise DataError(f"{where}: key '{key}' has two members '.{name}': write the shard again")
        current[1][name] = (offset, length)
        if name == "cls":
            stream.seek(offset)
            label = _label(where, key, stream.read(min(length, _LONGEST_LABEL + 1)), classes)
            current = (key, current[1], label)
    if current:
        yield current


def _members(where: str, stream: IO[bytes], size: int) -> Iterator[tuple[str, str, int, int]]:
    """(key, field, offset, bytes) of every member; names are data here and never become paths."""
    short = f"{where} is cut short: copy it again"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or every header stays in memory
                found = _MEMBER.fullmatch(member.name)
                if not found or member.isdir() or _META.search(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{where}: '{member.name}' is a link or no plain file: write the shard with `tar --dereference "
                        f"--hard-dereference`"
                    )
                if member.offset_data + member.size > size:
                    raise DataError(short)
                yield found[1], found[2].lower(), member.offset_data, member.size
            stream.seek(tar.offset)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(short if "unexpected end" in str(error) else f"{where} is not a tar file ({error})") from None
    end = stream.read(_END)
    if len(end) < tarfile.BLOCKSIZE:
        raise DataError(f"{where} is cut short, it has no end-of-archive mark: copy it again, or write it again")
    if end.strip(b"\0"):
        raise DataError(f"{where} is damaged after byte {tar.offset}: copy it again, or write it again")


def _label(where: str, key: str, data: bytes, classes: Sequence[str] | None) -> int:
    """The label in a `.cls` member: a number, or the name of a class if names are given."""
    text = data.decode(errors="replace").strip()
    if classes is not None and text in classes:
        return list(classes).index(text)
    try:
        label = int(text)
    except ValueError:
        remedy = "it is not one of --classes" if classes else "give the names with --classes"
        raise DataError(f"{where}: the label of '{key}' is {text[:40]!r}, not a number: {remedy}") from None
    if label < 0 or (classes is not None and label >= len(classes)):
        limit = f"0 to {len(classes) - 1}" if classes else "0 or more"
        raise DataError(f"{where}: the label of '{key}' is {label}, and labels are {limit}")
    return label


def _described(
    folder: str,
    index: Path,
    splits: dict[str, Split],
    indices: Sequence[ShardIndex],
    classes: Sequence[str] | None,
    name: str | None,
) -> Manifest:
    highest = max(int(one.labels.max()) for one in indices)
    fresh = Manifest(
        name=name or folder.rstrip("/").rsplit("/", 1)[-1],
        fields=fields_of(indices),
        classes=tuple(classes) if classes else tuple(str(label) for label in range(highest + 1)) or None,
        splits=splits,
    )
    try:
        before = read_manifest(index)
    except (OSError, DataError):
        return fresh
    if _digests(before) != _digests(fresh):
        return fresh
    kept = {"mean": before.mean, "std": before.std, "name": name or before.name}
    return fresh.model_copy(update=kept if classes else {**kept, "classes": before.classes})


def _digests(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [shard.index for shard in split.shards] for name, split in manifest.splits.items()}
