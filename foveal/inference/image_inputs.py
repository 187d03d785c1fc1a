"""Lists of images to read: files, files behind URLs, and samples of shards."""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foveal.data.format.shard_index import ShardIndex
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError

KEY_MARK = "#"  # between the path of a shard and the key of one of its samples


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
        label_field: str | None = None,
    ) -> None:
        self._path, self._num_samples, self._bit_depth = path, num_samples, bit_depth
        self._label_field = label_field
        self._load_index, self._read_bytes = load_index, read_bytes

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, position: int) -> ImageInput:
        index = self._load_index()

        def read() -> bytes:
            return self._read_bytes(index.shard, *index.find_image_offset_size(position, self._label_field))

        return ImageInput(f"{self._path}{KEY_MARK}{_printable(index.key(position))}", read, self._bit_depth)

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


def _digest_names(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0".encode())
    return digest.hexdigest()


def _printable(name: str) -> str:
    """Return a name that every table can hold: bytes that are no UTF-8 are written as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
