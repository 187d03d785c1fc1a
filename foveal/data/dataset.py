"""Opened data set: manifest, shards and indices, checked before training starts."""

import functools
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foveal.data.config import CacheConfig, DataConfig, expand_path, is_url
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, Split
from foveal.data.format.shard_index import INDEX_SUFFIX, ShardIndex
from foveal.data.storage.cache import DownloadCache, RemoteFile, open_cache
from foveal.data.storage.folder import Folder
from foveal.data.storage.listing import is_listing_rank, list_files, probe_file
from foveal.data.storage.manifest import find_manifest, format_index_option
from foveal.data.storage.prefetch import Prefetcher
from foveal.data.storage.reader import CachedShardReader, LocalShardReader, ShardReader
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError

PixelStatsOverride = tuple[tuple[float, ...] | None, tuple[float, ...] | None]  # mean and std

_OPEN_INDICES = 256  # indices that stay mapped
_MOST_REOPENED = 8  # data sets; those of a run and of its latest trials


@dataclass(frozen=True)
class Dataset:
    """Shards with their manifest and indices. Thread-safe. Sample ids are positions in a split, in shard order.

    A pickled data set is opened again where it is unpickled, with its manifest and without a look at its files.

    folder, index_folder: paths or URLs of shards and indices, for messages. shard_index: returns the mapped index of
    the n-th shard of a split. channels: of the decoded images.
    """

    folder: str
    index_folder: str
    manifest: Manifest
    shard_index: "functools._lru_cache_wrapper[ShardIndex]"
    channels: int
    _shard_reader: ShardReader
    _index_reader: ShardReader
    _cache: DownloadCache | None
    _prefetcher: Prefetcher | None
    _pixel_stats: PixelStatsOverride
    _open_again: "functools.partial[Dataset]"
    _identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    _kept_labels: dict[str, np.ndarray] = field(default_factory=dict)  # by split, in few bytes each
    _verified_shards: set[str] = field(default_factory=set)
    _verify_lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, cfg: DataConfig) -> "Dataset":
        """Open the data set of ``cfg`` and check the shards of its training and evaluation splits (``list_files_if``).

        Raises: DataError if folder, manifest, index, split or a shard is missing, empty or stale; ConfigError if an
        environment variable in a path is not set.
        """
        dataset = open_unchecked_dataset(
            cfg.path,
            cfg.index,
            channels=cfg.channels,
            pixel_stats=(cfg.mean, cfg.std),
            cache_config=cfg.cache,
            stall_timeout=cfg.stall_timeout_seconds,
        )
        # Pretraining needs no evaluation split; a missing split raises in evaluation.
        eval_splits = [cfg.val] if cfg.val in dataset.manifest.splits else []
        if is_listing_rank():
            dataset.check_shard_files(cfg.train, *eval_splits)
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._identity, self._open_again, self.manifest)

    @property
    def shard_folder(self) -> Folder:
        """Folder of the shards, for access beyond samples."""
        return self._shard_reader.folder

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, by label; None if samples have no labels."""
        return self.manifest.classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of training pixels in [0, 1], per channel or one value for all. Raises: DataError if unknown."""
        return self._require_pixel_stats("mean", self._pixel_stats[0] or self.manifest.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of training pixels in [0, 1], per channel. Raises: DataError if unknown or not above 0."""
        values = self._require_pixel_stats("std", self._pixel_stats[1] or self.manifest.std)
        if min(values) <= 0:
            raise DataError(
                f"{self.folder}: the std in {MANIFEST_NAME} is {list(values)}, not above 0; set data.mean and data.std"
            )
        return values * (self.channels // len(values))

    def num_samples(self, split: str) -> int:
        """Return the number of samples in a split."""
        return self._get_split(split).samples

    def samples_per_shard(self, split: str) -> np.ndarray:
        """Return the samples per shard of a split, int64 [S]."""
        return np.array([shard.samples for shard in self._get_split(split).shards], dtype=np.int64)

    def samples_digest(self, split: str) -> str:
        """Return the sha256 over keys, sizes and labels of a split's samples; independent of the folder."""
        return self._get_split(split).samples_digest

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split, int64 [N], -1 for none. Raises: DataError if a label exceeds the classes.

        The first call reads the index of every shard; its labels are kept.
        """
        if split not in self._kept_labels:
            shard_numbers = range(len(self._get_split(split).shards))
            labels = self._index_reader.read_in_a_row(
                lambda: np.concatenate([self.shard_index(split, number).labels for number in shard_numbers])
            )
            narrow_type = np.result_type(*map(np.min_scalar_type, (labels.min(), labels.max())))
            self._kept_labels[split] = labels.astype(narrow_type)
        labels = self._kept_labels[split].astype(np.int64)
        if self.classes and labels.max() >= len(self.classes):
            raise DataError(
                f"{self.index_folder}: split '{split}' has label {labels.max()}, and {MANIFEST_NAME} has "
                f"{len(self.classes)} classes: run `foveal data verify {self.folder}`"
            )
        return labels

    def class_counts(self, split: str) -> np.ndarray:
        """Return the samples per class of a split, int64 [classes]."""
        labels = self.labels(split)
        return np.bincount(labels[labels >= 0], minlength=len(self.classes or ()))

    def check_shard_files(self, *splits: str) -> None:
        """Check that every shard of ``splits`` exists with its size in the manifest, and so does its index.

        A server without listings (HTTP) cannot be checked here; its files are checked after their download.
        Raises: DataError if a shard is missing, of another size, too large for the cache or without index.
        """
        shards = [shard for split in splits for shard in self._get_split(split).shards]
        names = {shard.file for shard in shards}
        shard_sizes = list_files(self._shard_reader, names)
        index_sizes = (
            shard_sizes
            if self._index_reader is self._shard_reader
            else list_files(self._index_reader, {f"{name}{INDEX_SUFFIX}" for name in names})
        )
        remedy = f"run `foveal data index {self.folder}{format_index_option(self.folder, self.index_folder)}`"
        for shard in shards:
            path = self._shard_reader.folder.display_path(shard.file)
            if self._cache and self._cache.max_bytes < shard.bytes:
                raise DataError(
                    f"{path} has {shard.bytes / 1e9:.3g} GB, more than data.cache.max_gigabytes: raise that"
                )
            if shard_sizes is not None and shard.file not in shard_sizes:
                probe_file(self._shard_reader, shard.file)
                raise DataError(
                    f"{path} is missing, and {MANIFEST_NAME} lists it: restore it, or index the folder again"
                )
            size = (shard_sizes or {}).get(shard.file)
            if size not in (None, shard.bytes):
                raise DataError(
                    f"{path} has {size} bytes and {MANIFEST_NAME} says {shard.bytes}: restore it, or {remedy} again"
                )
            if index_sizes is not None and f"{shard.file}{INDEX_SUFFIX}" not in index_sizes:
                probe_file(self._index_reader, f"{shard.file}{INDEX_SUFFIX}")
                raise DataError(f"{path} has no index in {self.index_folder}: {remedy}")

    @property
    def num_index_reads(self) -> int:
        """Number of index files that this process has opened so far; those of labels are opened by every rank."""
        return self.shard_index.cache_info().misses

    def shard_display_path(self, split: str, shard_number: int) -> str:
        """Return the path or URL of the n-th shard of a split, for messages."""
        return self._shard_reader.folder.display_path(self._get_split(split).shards[shard_number].file)

    def read_bytes(self, shard_file: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset`` of a shard. Raises: DataError that names the shard."""
        return self._shard_reader.read_bytes(shard_file, offset, size)

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind a URL."""
        return is_url(self.folder)

    def read_range(self, shard_file: str, offset: int, size: int) -> bytes:
        """Return bytes as ``read_bytes``, of a remote shard without a copy of it, for a look at a few samples."""
        if not self.is_remote:
            return self.read_bytes(shard_file, offset, size)
        return self.shard_folder.read_up_to(shard_file, offset, offset + size)

    def verify_checksum_once(self, split: str, shard_number: int) -> None:
        """Verify the sha256 of the n-th shard of a split, once per shard, if the manifest has a sha256.

        Raises: DataError if the shard has another sha256.
        """
        shard = self._get_split(split).shards[shard_number]
        with self._verify_lock:
            if shard.sha256 is not None and shard.file not in self._verified_shards:
                self._shard_reader.verify_checksum(shard)
                self._verified_shards.add(shard.file)

    def prefetch_shards(self, split: str, shard_numbers: Sequence[int]) -> None:
        """Download remote shards and their indices in the background, in this order; never raises.

        A further call replaces downloads that have not started. The files stay in the cache as far as its size allows.
        """
        if self._prefetcher is None:
            return
        split_shards = self._get_split(split).shards
        files: list[RemoteFile | None] = []
        for number in shard_numbers:
            shard = split_shards[number]
            files += [self._index_reader.remote_index(shard), self._shard_reader.remote_shard(shard)]
        self._prefetcher.replace_requests([file for file in files if file is not None])

    def download_counter(self) -> int:
        """Return a counter that grows while remote bytes arrive; 0 for local folders."""
        return self._cache.download_counter() if self._cache else 0

    def watch_downloads(self, on_progress: Callable[[], None]) -> None:
        """Have a function called, from any thread, whenever remote bytes have arrived."""
        if self._cache:
            self._cache.on_progress = on_progress

    def _get_split(self, split: str) -> Split:
        entry = self.manifest.splits.get(split)
        if entry is None or not entry.samples:
            names = ", ".join(f"'{name}'" for name, value in self.manifest.splits.items() if value.samples) or "none"
            state = "is empty" if entry else "does not exist"
            raise DataError(f"{self.folder}: split '{split}' {state}; splits with samples: {names}")
        return entry

    def _require_pixel_stats(self, name: str, values: tuple[float, ...] | None) -> tuple[float, ...]:
        if values is None:
            raise DataError(f"{self.folder}: {MANIFEST_NAME} has no pixel statistics; set data.mean and data.std")
        if len(values) not in (1, self.channels):
            raise DataError(
                f"{self.folder}: the {name} in {MANIFEST_NAME} has {len(values)} values for "
                f"data.channels={self.channels}; set data.mean and data.std"
            )
        if min(values) < 0 or max(values) > 1:
            raise DataError(
                f"{self.folder}: the {name} in {MANIFEST_NAME} is {list(values)}, not of pixels in [0, 1]; set data.mean "
                f"and data.std"
            )
        return values


def open_unchecked_dataset(
    path: str,
    index_path: str | None,
    *,
    channels: int = 3,
    pixel_stats: PixelStatsOverride = (None, None),
    cache_config: CacheConfig | None = None,
    stall_timeout: float = 600.0,
    manifest: Manifest | None = None,
) -> Dataset:
    """Open the data set in a folder or behind a URL without checking its shards.

    index_path: folder or URL of manifest and indices (None: ``path``). pixel_stats: replaces the manifest's mean and
    std. cache_config: of the copies of remote files. stall_timeout: seconds that a read may make no progress. manifest:
    the one of this data set, if it has been read before.
    Raises: as ``Dataset.open``.
    """
    folder = expand_path(path, "data.path").rstrip("/") or "/"
    index_folder = folder if index_path is None else expand_path(index_path, "data.index").rstrip("/") or "/"
    remotes = {
        location: RemoteFolder(location, stall_timeout) for location in {folder, index_folder} if is_url(location)
    }
    if manifest is None:
        manifest = find_manifest(folder, index_folder, remotes.get(index_folder), stall_timeout)
    cache = open_cache(cache_config or CacheConfig(), stall_timeout) if remotes else None
    shards = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    readers: dict[str, ShardReader] = {
        location: (
            CachedShardReader(remotes[location], cache, shards)
            if cache and location in remotes
            else LocalShardReader(location, stall_timeout)
        )
        for location in {folder, index_folder}
    }

    @functools.lru_cache(maxsize=_OPEN_INDICES)
    def load_index(split: str, number: int) -> ShardIndex:
        return readers[index_folder].load_index(manifest.splits[split].shards[number])

    return Dataset(
        folder=readers[folder].folder.display_path(),
        index_folder=readers[index_folder].folder.display_path(),
        manifest=manifest,
        shard_index=load_index,
        channels=channels,
        _shard_reader=readers[folder],
        _index_reader=readers[index_folder],
        _cache=cache,
        _prefetcher=Prefetcher(cache) if cache else None,
        _pixel_stats=pixel_stats,
        _open_again=functools.partial(
            open_unchecked_dataset,
            path,
            index_path,
            channels=channels,
            pixel_stats=pixel_stats,
            cache_config=cache_config,
            stall_timeout=stall_timeout,
        ),
    )


def _reopen(identity: str, open_again: "functools.partial[Dataset]", manifest: Manifest) -> Dataset:
    """Return a data set that was opened in another process; the same one for all that was pickled of it."""
    if identity not in _reopened:
        if len(_reopened) == _MOST_REOPENED:
            del _reopened[next(iter(_reopened))]
        _reopened[identity] = open_again(manifest=manifest)
    return _reopened[identity]


_reopened: dict[str, Dataset] = {}
