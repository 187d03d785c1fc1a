"""The images that a command names: files, folders, globs, shards, packed data sets, and URLs of these."""

import fnmatch
import functools
import glob
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from foveal.data.config import is_url
from foveal.data.dataset import Dataset, open_unchecked_dataset
from foveal.data.format.manifest import MANIFEST_NAME
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, mmap_index
from foveal.data.indexing.shards import scan_shard
from foveal.data.pack.image_tree import IMAGE_SUFFIXES, PassedOver, scan_folder
from foveal.data.storage.folder import Folder
from foveal.data.storage.reader import LocalShardReader
from foveal.data.storage.remote import PermanentRemoteError, RemoteFolder
from foveal.errors import DataError
from foveal.inference.image_inputs import KEY_MARK, ImageGroup, ImageList, LocalImages, RemoteImages, ShardImages
from foveal.redact import redact_url_secrets

_STALL_TIMEOUT = 120.0  # seconds: of a read without progress, and of a request with all its attempts
_SHARD_SUFFIX = ".tar"
_GLOB_CHARACTERS = frozenset("*?[")


def resolve_images(sources: Sequence[str], label_field: str | None = None) -> ImageList:
    """Return the images of files, folders (with all folders below), globs, shards, data sets and URLs, in this order.

    A folder of shards is its shards' images; of a packed data set they are those of all splits. Two sources may name
    the same image, which then comes twice. ``label_field``: member of a shard's samples that is never their image.
    Raises: DataError for a source that does not exist, or if there is no image in all of them.
    """
    resolver = _Resolver(label_field)
    images = ImageList([group for source in sources for group in resolver.resolve(source)])
    if not len(images):
        raise DataError(f"no image in {', '.join(map(redact_url_secrets, sources))}: give files, folders or shards")
    return images


class _Resolver:
    """Turns sources into images. The manifest of a folder is read once."""

    def __init__(self, label_field: str | None) -> None:
        self._label_field = label_field
        self._datasets: dict[str, Dataset | None] = {}

    def resolve(self, source: str) -> list[ImageGroup]:
        if is_url(source):
            return self._resolve_url(source)
        path = Path(source)
        if path.is_dir():
            return self._resolve_folder(path)
        if path.exists():
            return [self._open_local_shard(path) if path.suffix == _SHARD_SUFFIX else LocalImages([path])]
        shard, key = _split_key(source)
        if key and Path(shard).is_file():
            return [self._open_local_shard(Path(shard)).select(key)]
        if _GLOB_CHARACTERS.isdisjoint(source):
            raise DataError(f"no such file or folder: {source}")
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - of an absolute or a relative pattern
        if not matches:
            raise DataError(f"no file matches {source}")
        return [group for match in _select_matches(matches) for group in self.resolve(match)]

    def _resolve_folder(self, folder: Path) -> list[ImageGroup]:
        shards = sorted(folder.glob(f"*{_SHARD_SUFFIX}"))
        dataset = self._local_dataset(folder) if shards else None
        if dataset is not None:
            return _all_shards(dataset, self._label_field)
        images = [image.path for image in scan_folder(folder, PassedOver()).walk()]
        return [*map(self._open_local_shard, shards), LocalImages(images)]

    def _resolve_url(self, url: str) -> list[ImageGroup]:
        url, key = _split_key(url)
        is_http = url.startswith("http")
        path, mark, query = url.partition("?") if is_http else (url, "", "")
        if not is_http and not _GLOB_CHARACTERS.isdisjoint(path):
            return self._resolve_url_glob(path)
        parent, _, name = path.rstrip("/").rpartition("/")
        parent_url = f"{parent}{mark}{query}"
        if name.endswith(_SHARD_SUFFIX):
            shard = self._open_remote_shard(_open_remote(parent_url), name)
            return [shard.select(key) if key else shard]
        if _has_image_suffix(name):
            return [RemoteImages(_open_remote(parent_url), [name])]
        dataset = self._remote_dataset(url)
        if dataset is not None:
            return _all_shards(dataset, self._label_field)
        folder = _open_remote(url)
        return self._remote_groups(folder, sorted(folder.walk_files()))

    def _resolve_url_glob(self, url: str) -> list[ImageGroup]:
        """Return the files that match, part by part: ``*`` matches within the name of a file or folder."""
        parts = url.split("/")
        first = next(number for number, part in enumerate(parts) if not _GLOB_CHARACTERS.isdisjoint(part))
        folder, patterns = _open_remote("/".join(parts[:first])), parts[first:]

        def matches(name: str) -> bool:
            names = name.split("/")
            return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

        groups = self._remote_groups(folder, [name for name in sorted(folder.walk_files()) if matches(name)])
        if not any(map(len, groups)):
            raise DataError(f"no image or shard matches {redact_url_secrets(url)}")
        return groups

    def _remote_groups(self, folder: RemoteFolder, names: Sequence[str]) -> list[ImageGroup]:
        shards = [name for name in names if name.endswith(_SHARD_SUFFIX)]
        images = [name for name in names if _has_image_suffix(name)]
        return [*(self._open_remote_shard(folder, name) for name in shards), RemoteImages(folder, images)]

    def _open_local_shard(self, path: Path) -> ShardImages:
        """Return a shard's images: by the manifest beside it that lists it, its own index, or a scan of its headers."""
        listed = _find_shard(self._local_dataset(path.parent), path.name, self._label_field)
        if listed is not None:
            return listed
        reader = LocalShardReader(str(path.parent), _STALL_TIMEOUT)
        return _scan_images(
            reader.folder, path.name, str(path), reader.read_bytes, _read_own_index(path), self._label_field
        )

    def _open_remote_shard(self, folder: RemoteFolder, name: str) -> ShardImages:
        """Return a shard's images, as of a local one: one by one, or if a manifest lists it from a copy of the shard."""
        inner, _, file = f"/{name}".rpartition("/")
        listed = _find_shard(self._remote_dataset(f"{folder.folder}{inner}"), file, self._label_field)
        if listed is not None:
            return listed

        def read_bytes(_file: str, offset: int, size: int) -> bytes:
            return folder.read_up_to(name, offset, offset + size)

        return _scan_images(folder, name, folder.display_path(name), read_bytes, None, self._label_field)

    def _local_dataset(self, folder: Path) -> Dataset | None:
        """Return the packed data set in a folder; None if there is no manifest."""
        if not (folder / MANIFEST_NAME).is_file():
            return None
        return self._open_dataset(str(folder))

    def _remote_dataset(self, url: str) -> Dataset | None:
        if url not in self._datasets:
            try:
                _open_remote(url).file_size(MANIFEST_NAME)
            except PermanentRemoteError:
                self._datasets[url] = None
        return self._open_dataset(url)

    def _open_dataset(self, path_or_url: str) -> Dataset | None:
        if path_or_url not in self._datasets:
            self._datasets[path_or_url] = open_unchecked_dataset(path_or_url, None, stall_timeout=_STALL_TIMEOUT)
        return self._datasets[path_or_url]


def _select_matches(matches: Sequence[str]) -> list[str]:
    """Return what a glob means: images and shards, and folders, with all below them, of which it matches nothing else."""
    inside = {str(parent) for match in matches for parent in Path(match).parents}
    return [
        match
        for match in matches
        if (
            str(Path(match)) not in inside
            if Path(match).is_dir()
            else _has_image_suffix(match) or match.endswith(_SHARD_SUFFIX)
        )
    ]


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower()[1:] in IMAGE_SUFFIXES


def _split_key(source: str) -> tuple[str, str]:
    """Return the path or URL of a shard, and the key of one of its samples; '' if the source names no sample."""
    shard, mark, key = source.partition(f"{_SHARD_SUFFIX}{KEY_MARK}")
    return (f"{shard}{_SHARD_SUFFIX}", key) if mark else (source, "")


def _open_remote(url: str) -> RemoteFolder:
    return RemoteFolder(url, _STALL_TIMEOUT)


def _all_shards(dataset: Dataset, label_field: str | None) -> list[ImageGroup]:
    numbers = [
        (split, number) for split, entry in dataset.manifest.splits.items() for number in range(len(entry.shards))
    ]
    return [_shard_of_dataset(dataset, split, number, label_field) for split, number in numbers]


def _find_shard(dataset: Dataset | None, file: str, label_field: str | None) -> ShardImages | None:
    """Return the shard of a data set with this file name; None if it lists none."""
    for split, entry in dataset.manifest.splits.items() if dataset is not None else ():
        for number, shard in enumerate(entry.shards):
            if dataset is not None and shard.file == file:
                return _shard_of_dataset(dataset, split, number, label_field)
    return None


def _shard_of_dataset(dataset: Dataset, split: str, number: int, label_field: str | None) -> ShardImages:
    shard = dataset.manifest.splits[split].shards[number]
    return ShardImages(
        dataset.shard_display_path(split, number),
        shard.samples,
        functools.partial(dataset.shard_index, split, number),
        dataset.read_bytes,
        dataset.manifest.bit_depth,
        label_field,
    )


def _read_own_index(path: Path) -> ShardIndex | None:
    """Return the index beside a shard; None if there is none, or one of another file."""
    file = path.with_name(f"{path.name}{INDEX_SUFFIX}")
    index = mmap_index(file)[0] if file.is_file() else None
    is_its_own = index is not None and (index.shard, index.bytes) == (path.name, path.stat().st_size)
    return index if is_its_own else None


def _scan_images(
    folder: Folder,
    name: str,
    path: str,
    read_bytes: Callable[[str, int, int], bytes],
    index: ShardIndex | None,
    label_field: str | None,
) -> ShardImages:
    """Return a shard's images by its index; None: by a scan of its headers."""
    known_index = scan_shard(folder, name, IndexRules()) if index is None else index
    return ShardImages(path, len(known_index), lambda: known_index, read_bytes, label_field=label_field)
