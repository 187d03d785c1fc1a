"""The images that a command names: files, folders, globs, shards, packed data sets, and URLs."""

import bisect
import fnmatch
import functools
import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foveal.data.config import is_url
from foveal.data.dataset import Dataset, open_unchecked_dataset
from foveal.data.format.manifest import MANIFEST_NAME
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, mmap_index
from foveal.data.indexing.shards import scan_shard
from foveal.data.pack.image_tree import IMAGE_SUFFIXES, PassedOver, scan_folder
from foveal.data.storage.folder import Folder
from foveal.data.storage.reader import LocalShardReader
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError
from foveal.redact import redact_url_secrets

_STALL_TIMEOUT = 120.0  # seconds: of a read without progress, and of a request with all its attempts
_SHARD_SUFFIX = ".tar"
_KEY_MARK = "#"  # between the path of a shard and the key of one of its samples
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image to read.

    name: its path, its URL, or SHARD.tar#KEY, which name it on the command line, too. read: returns its bytes, and
    raises DataError or OSError. bit_depth: that of its data set, if it states one.
    """

    name: str
    read: Callable[[], bytes]
    bit_depth: int | None = None


class ImageGroup(Protocol):
    """Images of one origin. ``digest`` identifies them by names, and those of shards also by sizes."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> ImageInput: ...
    def digest(self) -> str: ...


class ImageList:
    """The images of a command in order. Images of shards are looked up when they are read, so that lists may be long."""

    def __init__(self, groups: Sequence[ImageGroup]) -> None:
        self._groups = [group for group in groups if len(group)]
        self._ends: list[int] = []
        for group in self._groups:
            self._ends.append(len(self) + len(group))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> ImageInput:
        number = bisect.bisect_right(self._ends, position)
        if position < 0 or number == len(self._groups):
            raise IndexError(position)
        group = self._groups[number]
        return group[position - self._ends[number] + len(group)]

    def digest(self) -> str:
        """Return the sha256 that identifies the images and their order."""
        return hashlib.sha256("\n".join(group.digest() for group in self._groups).encode()).hexdigest()


class LocalImages:
    """Image files of this machine."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> ImageInput:
        path = self._paths[position]
        return ImageInput(_printable(str(path)), path.read_bytes)

    def digest(self) -> str:
        return _digest_names(_printable(str(path)) for path in self._paths)


class RemoteImages:
    """Image files of a folder behind a URL."""

    def __init__(self, folder: RemoteFolder, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> ImageInput:
        name = self._names[position]

        def read() -> bytes:
            return self._folder.read_up_to(name, 0, self._folder.file_size(name))

        return ImageInput(self._folder.display_path(name), read)

    def digest(self) -> str:
        return _digest_names(self._folder.display_path(name) for name in self._names)


class ShardImages:
    """Images of the samples of a shard. ``load_index`` is called whenever the index is used, and may forget it."""

    def __init__(
        self,
        path: str,
        num_samples: int,
        load_index: Callable[[], ShardIndex],
        read_bytes: Callable[[str, int, int], bytes],
        bit_depth: int | None = None,
    ) -> None:
        self._path, self._num_samples, self._bit_depth = path, num_samples, bit_depth
        self._load_index, self._read_bytes = load_index, read_bytes

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, position: int) -> ImageInput:
        index = self._load_index()

        def read() -> bytes:
            return self._read_bytes(index.shard, *index.find_image_offset_size(position))

        return ImageInput(f"{self._path}{_KEY_MARK}{_printable(index.key(position))}", read, self._bit_depth)

    def digest(self) -> str:
        return _digest_names([self._path, self._load_index().compute_samples_digest()])

    def select(self, key: str) -> "OneImage":
        """Return the image of one sample. Raises: DataError if the shard has no such key."""
        index = self._load_index()
        for position in range(len(self)):
            if _printable(index.key(position)) == key:
                return OneImage(self[position])
        raise DataError(f"{self._path} has no sample '{key}': give a key of one of its {len(self):,} samples")


@dataclass(frozen=True)
class OneImage:
    """One image of a shard."""

    image: ImageInput

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> ImageInput:
        return self.image

    def digest(self) -> str:
        return _digest_names([self.image.name])


def resolve_images(sources: Sequence[str]) -> ImageList:
    """Return the images of files, folders (with all folders below), globs, shards, data sets and URLs, in this order.

    A folder of shards is its shards' images; of a packed data set they are those of all splits. Two sources may name
    the same image, which then comes twice.
    Raises: DataError for a source that does not exist, or if there is no image in all of them.
    """
    groups = [group for source in sources for group in _resolve(source)]
    images = ImageList(groups)
    if not len(images):
        raise DataError(f"no image in {', '.join(map(redact_url_secrets, sources))}: give files, folders or shards")
    return images


def _resolve(source: str) -> list[ImageGroup]:
    if is_url(source):
        return _resolve_url(source)
    path = Path(source)
    if path.is_dir():
        return _resolve_folder(path)
    if path.exists():
        return [_open_local_shard(path) if path.suffix == _SHARD_SUFFIX else LocalImages([path])]
    shard, mark, key = source.rpartition(_KEY_MARK)
    if mark and shard.endswith(_SHARD_SUFFIX) and Path(shard).is_file():
        return [_open_local_shard(Path(shard)).select(key)]
    if not _GLOB_CHARACTERS.isdisjoint(source):
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - of an absolute or a relative pattern
        if matches:
            return [group for match in matches for group in _resolve(match)]
        raise DataError(f"no file matches {source}")
    raise DataError(f"no such file or folder: {source}")


def _resolve_folder(folder: Path) -> list[ImageGroup]:
    shards = sorted(folder.glob(f"*{_SHARD_SUFFIX}"))
    if shards and (folder / MANIFEST_NAME).is_file():
        return list(_open_dataset(str(folder)))
    images = [image.path for image in scan_folder(folder, PassedOver()).walk()]
    return [*map(_open_local_shard, shards), LocalImages(images)]


def _resolve_url(url: str) -> list[ImageGroup]:
    is_http = url.startswith("http")
    path, mark, query = url.partition("?") if is_http else (url, "", "")
    parent, _, name = path.rstrip("/").rpartition("/")
    shard_name, key_mark, key = name.rpartition(_KEY_MARK)
    if key_mark and shard_name.endswith(_SHARD_SUFFIX):
        return [_open_remote_shard(RemoteFolder(f"{parent}{mark}{query}", _STALL_TIMEOUT), shard_name).select(key)]
    if name.endswith(_SHARD_SUFFIX):
        return [_open_remote_shard(RemoteFolder(f"{parent}{mark}{query}", _STALL_TIMEOUT), name)]
    if not is_http and not _GLOB_CHARACTERS.isdisjoint(path):
        return _resolve_url_glob(path)
    if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
        return [RemoteImages(RemoteFolder(f"{parent}{mark}{query}", _STALL_TIMEOUT), [name])]
    folder = RemoteFolder(url, _STALL_TIMEOUT)
    names = folder.file_sizes().keys()
    if MANIFEST_NAME in names and any(name.endswith(_SHARD_SUFFIX) for name in names):
        return list(_open_dataset(url))
    return _remote_groups(folder, sorted(folder.walk_files()))


def _resolve_url_glob(url: str) -> list[ImageGroup]:
    """Return the files that match, part by part: ``*`` matches within the name of a file or folder."""
    parts = url.split("/")
    first = next(number for number, part in enumerate(parts) if not _GLOB_CHARACTERS.isdisjoint(part))
    folder, patterns = RemoteFolder("/".join(parts[:first]), _STALL_TIMEOUT), parts[first:]

    def matches(name: str) -> bool:
        names = name.split("/")
        return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

    groups = _remote_groups(folder, [name for name in sorted(folder.walk_files()) if matches(name)])
    if not any(map(len, groups)):
        raise DataError(f"no image or shard matches {redact_url_secrets(url)}")
    return groups


def _remote_groups(folder: RemoteFolder, names: Sequence[str]) -> list[ImageGroup]:
    shards = [name for name in names if name.endswith(_SHARD_SUFFIX)]
    images = [name for name in names if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES]
    return [*(_open_remote_shard(folder, name) for name in shards), RemoteImages(folder, images)]


def _open_dataset(path_or_url: str, only_shard: str | None = None) -> list[ShardImages]:
    """Return the shards of a packed data set, split by split; ``only_shard``: this file of it, if it is one."""
    dataset = open_unchecked_dataset(path_or_url, None, stall_timeout=_STALL_TIMEOUT)
    return [
        _shard_of_dataset(dataset, split, number)
        for split, entry in dataset.manifest.splits.items()
        for number, shard in enumerate(entry.shards)
        if only_shard in (None, shard.file)
    ]


def _shard_of_dataset(dataset: Dataset, split: str, number: int) -> ShardImages:
    shard = dataset.manifest.splits[split].shards[number]
    return ShardImages(
        dataset.shard_display_path(split, number),
        shard.samples,
        functools.partial(dataset.shard_index, split, number),
        dataset.read_bytes,
        dataset.manifest.bit_depth,
    )


def _open_local_shard(path: Path) -> ShardImages:
    """Return a shard's images: by the manifest beside it that lists it, its own index, or a scan of its headers."""
    if (path.parent / MANIFEST_NAME).is_file():
        for shard in _open_dataset(str(path.parent), only_shard=path.name):
            return shard
    index = _read_own_index(path)
    reader = LocalShardReader(str(path.parent), _STALL_TIMEOUT)
    return _scanned_shard(reader.folder, path.name, str(path), reader.read_bytes, index)


def _read_own_index(path: Path) -> ShardIndex | None:
    """Return the index beside a shard; None if there is none, or one of another file."""
    file = path.with_name(f"{path.name}{INDEX_SUFFIX}")
    index = mmap_index(file)[0] if file.is_file() else None
    is_its_own = index is not None and (index.shard, index.bytes) == (path.name, path.stat().st_size)
    return index if is_its_own else None


def _open_remote_shard(folder: RemoteFolder, name: str) -> ShardImages:
    def read_bytes(shard: str, offset: int, size: int) -> bytes:
        return folder.read_up_to(shard, offset, offset + size)

    return _scanned_shard(folder, name, folder.display_path(name), read_bytes, None)


def _scanned_shard(
    folder: Folder, name: str, path: str, read_bytes: Callable[[str, int, int], bytes], index: ShardIndex | None
) -> ShardImages:
    index = scan_shard(folder, name, IndexRules()) if index is None else index
    return ShardImages(path, len(index), lambda: index, read_bytes)


def _digest_names(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0".encode())
    return digest.hexdigest()


def _printable(name: str) -> str:
    """Return a name that every encoding of tables can hold: bytes that are no UTF-8 as \\xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
