"""A data set that is there: manifest, shards and indices checked, before anything trains on it."""

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foveal.data.config import CacheConfig, DataConfig, expand_path, is_remote
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, Split, parse_manifest, read_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, ShardIndex
from foveal.data.storage.cache import DownloadCache, open_cache
from foveal.data.storage.folder import Folder
from foveal.data.storage.prefetch import Prefetcher
from foveal.data.storage.reader import CachedShardReader, LocalShardReader, ShardReader
from foveal.data.storage.remote import RemoteFolder, RemoteNotFoundError
from foveal.errors import DataError, StorageUnreachableError
from foveal.redact import redact_urls
from foveal.timeouts import STORAGE_AWAY_ERRNOS, read_with_timeout

PixelStatsOverride = tuple[tuple[float, ...] | None, tuple[float, ...] | None]  # mean and std

_OPEN_INDICES = 256


@dataclass(frozen=True)
class Dataset:
    """Shards with their manifest. Sample ids are positions in a split, in the order of its shards.

    folder, index_folder: where the shards and their indices are, for sentences; index: the mapped index of the n-th
    shard of a split. Everything serves any number of threads.
    """

    folder: str
    index_folder: str
    manifest: Manifest
    shard_index: Callable[[str, int], ShardIndex]
    channels: int
    _shard_reader: ShardReader
    _index_reader: ShardReader
    _cache: DownloadCache | None
    _prefetcher: Prefetcher | None
    _pixel_stats: PixelStatsOverride
    _verified_shards: set[str] = field(default_factory=set)
    _verify_lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, cfg: DataConfig) -> "Dataset":
        """Open the shards that ``cfg`` names and check those of its two splits.

        Raises: DataError in one sentence if folder, manifest, index, split or a shard is missing, empty or stale;
        ConfigError if an environment variable in a path is not set.
        """
        dataset = open_dataset(
            cfg.path,
            cfg.index,
            channels=cfg.channels,
            pixel_stats=(cfg.mean, cfg.std),
            cache_config=cfg.cache,
            stall_timeout=cfg.patience_seconds,
        )
        # A set without a split for evaluation can be pretrained on; evaluating on it says what is missing.
        dataset.check_shards(cfg.train, *(name for name in (cfg.val,) if name in dataset.manifest.splits))
        return dataset

    @property
    def shard_folder(self) -> Folder:
        """The folder of the shards, for those who read more of it than samples."""
        return self._shard_reader.folder

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, by label; nothing if samples have no labels."""
        return self.manifest.classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of training pixels in [0, 1], one value per channel or one for all. Raises: DataError if not known."""
        return self._require_pixel_stats("mean", self._pixel_stats[0] or self.manifest.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of training pixels in [0, 1], as ``mean``."""
        values = self._require_pixel_stats("std", self._pixel_stats[1] or self.manifest.std)
        if min(values) <= 0:
            raise DataError(
                f"{self.folder}: the std in {MANIFEST_NAME} is {list(values)}, not above 0; set data.mean and data.std"
            )
        return values * (self.channels // len(values))

    def num_samples(self, split: str) -> int:
        """Samples in a split."""
        return self._get_split(split).samples

    def samples_per_shard(self, split: str) -> np.ndarray:
        """Samples per shard of a split, int64 [S]."""
        return np.array([shard.samples for shard in self._get_split(split).shards], dtype=np.int64)

    def digest(self, split: str) -> str:
        """sha256 of what a split's samples are: their keys, sizes and labels, wherever the shards lie."""
        return hashlib.sha256("".join(shard.index for shard in self._get_split(split).shards).encode()).hexdigest()

    def labels(self, split: str) -> np.ndarray:
        """Labels of all samples of a split, int64 [N]; -1 where there is none. Raises: DataError for one of no class."""
        shards = range(len(self._get_split(split).shards))
        labels = np.concatenate([self.shard_index(split, number).labels for number in shards])
        if self.classes and labels.max() >= len(self.classes):
            raise DataError(
                f"{self.index_folder}: split '{split}' has label {labels.max()}, and {MANIFEST_NAME} has {len(self.classes)} "
                f"classes: run `foveal data verify {self.folder}`"
            )
        return labels

    def class_counts(self, split: str) -> np.ndarray:
        """Samples of every class of a split, int64 [classes]."""
        labels = self.labels(split)
        return np.bincount(labels[labels >= 0], minlength=len(self.classes or ()))

    def check_shards(self, *splits: str) -> None:
        """See that every shard of these splits is there with the size that the manifest says, and so is its index.

        What a server does not list (HTTP) is checked when it arrives.
        """
        wanted = [shard for split in splits for shard in self._get_split(split).shards]
        names = {shard.file for shard in wanted}
        found = _list_files(self._shard_reader, names)
        indices = (
            found
            if self._index_reader is self._shard_reader
            else _list_files(self._index_reader, {f"{n}{INDEX_SUFFIX}" for n in names})
        )
        again = f"run `foveal data index {self.folder}{_index_option(self.folder, self.index_folder)}`"
        for shard in wanted:
            where = self._shard_reader.folder.display_path(shard.file)
            if self._cache and self._cache.max_bytes < shard.bytes:
                raise DataError(f"{where} has {shard.bytes / 1e9:.3g} GB, more than data.cache.gigabytes: raise that")
            if found is not None and shard.file not in found:
                _probe_file(self._shard_reader, shard.file)
                raise DataError(
                    f"{where} is missing, and {MANIFEST_NAME} lists it: restore it, or index the folder again"
                )
            size = (found or {}).get(shard.file)
            if size not in (None, shard.bytes):
                raise DataError(
                    f"{where} has {size} bytes and {MANIFEST_NAME} says {shard.bytes}: restore it, or {again} again"
                )
            if indices is not None and f"{shard.file}{INDEX_SUFFIX}" not in indices:
                _probe_file(self._index_reader, f"{shard.file}{INDEX_SUFFIX}")
                raise DataError(f"{where} has no index in {self.index_folder}: {again}")

    def shard_display_path(self, split: str, shard_number: int) -> str:
        """The path or URL of the n-th shard of a split, for sentences."""
        return self._shard_reader.folder.display_path(self._get_split(split).shards[shard_number].file)

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the shard with this file name. Raises: DataError that names it."""
        return self._shard_reader.read_bytes(shard_file, offset, size)

    def verify_checksum(self, split: str, shard_number: int) -> None:
        """See, once, that the bytes of the n-th shard of a split have the sha256 that the manifest knows, if it does.

        Raises: DataError if they have not.
        """
        shard = self._get_split(split).shards[shard_number]
        with self._verify_lock:
            if shard.sha256 is not None and shard.file not in self._verified_shards:
                self._shard_reader.verify_checksum(shard)
                self._verified_shards.add(shard.file)

    def prefetch_shards(self, split: str, shard_numbers: Sequence[int]) -> None:
        """Let shards that lie behind a URL be copied in the background, in this order; never raises.

        Another call replaces what has not begun. What is named stays in the cache, as far as it holds that much.
        """
        if self._prefetcher is None:
            return
        listed = self._get_split(split).shards
        files = [
            each
            for n in shard_numbers
            for each in (self._index_reader.remote_index(listed[n]), self._shard_reader.remote_shard(listed[n]))
        ]
        self._prefetcher.request_files([each for each in files if each is not None])

    def progress(self) -> int:
        """Grows while bytes arrive from elsewhere; still where all is in folders."""
        return self._cache.progress() if self._cache else 0

    def _get_split(self, split: str) -> Split:
        found = self.manifest.splits.get(split)
        if found is None or not found.samples:
            names = ", ".join(f"'{name}'" for name, other in self.manifest.splits.items() if other.samples) or "none"
            state = "is empty" if found else "does not exist"
            raise DataError(f"{self.folder}: split '{split}' {state}; splits with samples: {names}")
        return found

    def _require_pixel_stats(self, name: str, values: tuple[float, ...] | None) -> tuple[float, ...]:
        if values is None:
            raise DataError(f"{self.folder}: {MANIFEST_NAME} has no pixel statistics; set data.mean and data.std")
        if len(values) not in (1, self.channels):
            raise DataError(
                f"{self.folder}: the {name} in {MANIFEST_NAME} has {len(values)} values for data.channels={self.channels}; "
                f"set data.mean and data.std"
            )
        return values


def open_dataset(
    path: str,
    index_path: str | None,
    *,
    channels: int = 3,
    pixel_stats: PixelStatsOverride = (None, None),
    cache_config: CacheConfig | None = None,
    stall_timeout: float = 600.0,
) -> Dataset:
    """The data set of a folder or URL, its shards not yet checked; ``statistics`` go before the manifest's.

    cache: where copies of remote files are kept; patience: seconds to wait for data that does not move.
    Raises: as ``Dataset.open``.
    """
    folder = expand_path(path, "data.path").rstrip("/") or "/"
    beside = folder if index_path is None else expand_path(index_path, "data.index").rstrip("/") or "/"
    remotes = {place: RemoteFolder(place, stall_timeout) for place in {folder, beside} if is_remote(place)}
    if beside in remotes:
        manifest = _read_remote_manifest(remotes[beside], folder)
    else:
        manifest = read_with_timeout(
            Path(beside) / MANIFEST_NAME, stall_timeout, lambda: _read_local_manifest(folder, Path(beside))
        )
    copies = open_cache(cache_config or CacheConfig(), stall_timeout) if remotes else None
    shards = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    readers: dict[str, ShardReader] = {
        place: (
            CachedShardReader(remotes[place], copies, shards)
            if copies and place in remotes
            else LocalShardReader(place, stall_timeout)
        )
        for place in {folder, beside}
    }

    @functools.lru_cache(maxsize=_OPEN_INDICES)
    def opened(split: str, number: int) -> ShardIndex:
        return readers[beside].load_index(manifest.splits[split].shards[number])

    return Dataset(
        folder=readers[folder].folder.display_path(),
        index_folder=readers[beside].folder.display_path(),
        manifest=manifest,
        shard_index=opened,
        channels=channels,
        _shard_reader=readers[folder],
        _index_reader=readers[beside],
        _cache=copies,
        _prefetcher=Prefetcher(copies) if copies else None,
        _pixel_stats=pixel_stats,
    )


def _list_files(place: ShardReader, wanted: set[str]) -> dict[str, int | None] | None:
    """The files of a folder and their sizes; None if it is read but not listed, or what is listed is another thing."""
    try:
        found = place.folder.file_sizes()
    except RemoteNotFoundError:
        return None
    is_a_page = None in found.values()  # of links: those of a site's front page, perhaps
    return None if is_a_page and wanted.isdisjoint(found) else found


def _probe_file(place: ShardReader, name: str) -> None:
    """Wait for a name that is no plain file, and may never answer. Raises: Unreachable."""
    if is_remote(place.folder.display_path()):
        return
    try:
        place.folder.read_range(name, 0, 1)
    except StorageUnreachableError:
        raise
    except DataError:
        return


def _read_remote_manifest(remote: RemoteFolder, folder: str) -> Manifest:
    try:
        return parse_manifest(
            remote.read_range(MANIFEST_NAME, 0, remote.file_size(MANIFEST_NAME)), remote.display_path(MANIFEST_NAME)
        )
    except RemoteNotFoundError as error:
        raise DataError(
            f"{error}: run `foveal data index {redact_urls(folder)} --index "
            f"FOLDER` and set data.index to that folder, or correct data.path"
        ) from None


def _index_option(folder: str, index: str) -> str:
    """How `foveal data index` is told where the index of a folder is, if not beside it."""
    return "" if folder == index else f" --index {index}"


def _read_local_manifest(folder: str, beside: Path) -> Manifest:
    if not is_remote(folder) and not Path(folder).is_dir():
        raise DataError(f"data.path: no such folder: {folder}")
    try:
        return read_manifest(beside)
    except OSError as error:
        if error.errno in STORAGE_AWAY_ERRNOS:
            raise
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{beside / MANIFEST_NAME} cannot be read ({error})") from None
    if is_remote(folder):
        url = redact_urls(folder)
        raise DataError(f"{url}: no {MANIFEST_NAME} in {beside}; run `foveal data index {url} --index {beside}`")
    elsewhere = _index_option(folder, str(beside))
    if any(Path(folder).glob("*.tar")):
        raise DataError(f"{folder}: these shards have no index; run `foveal data index {folder}{elsewhere}`")
    if any(Path(folder).glob("*.tar.*")):
        raise DataError(f"{folder}: these shards are compressed, which has no random access; unpack and index them")
    raise DataError(
        f"{folder}: no {MANIFEST_NAME} and no shards (*.tar) here; run `foveal data pack` or correct data.path"
    )
