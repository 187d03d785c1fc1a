"""A data set that is there: manifest, shards and indices checked, before anything trains on it."""

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foveal.data.config import CacheConfig, DataConfig, expanded, is_remote
from foveal.data.format.manifest import NAME, Manifest, Split, parse_manifest, read_manifest
from foveal.data.format.shard_index import SUFFIX, ShardIndex
from foveal.data.storage.cache import Cache, cache_of
from foveal.data.storage.folder import Folder
from foveal.data.storage.prefetch import Prefetch
from foveal.data.storage.reader import CachedReader, LocalReader, Reader
from foveal.data.storage.remote import NotThere, Remote
from foveal.errors import DataError, Unreachable
from foveal.redact import redact_urls
from foveal.timeouts import AWAY, answered

Statistics = tuple[tuple[float, ...] | None, tuple[float, ...] | None]  # mean and std

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
    index: Callable[[str, int], ShardIndex]
    channels: int
    _shards: Reader
    _indices: Reader
    _cache: Cache | None
    _prefetch: Prefetch | None
    _statistics: Statistics
    _vouched: set[str] = field(default_factory=set)
    _vouching: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, cfg: DataConfig) -> "Dataset":
        """Open the shards that ``cfg`` names and check those of its two splits.

        Errors: DataError in one sentence if folder, manifest, index, split or a shard is missing, empty or stale;
        ConfigError if an environment variable in a path is not set.
        """
        dataset = open_folder(
            cfg.path,
            cfg.index,
            channels=cfg.channels,
            statistics=(cfg.mean, cfg.std),
            cache=cfg.cache,
            patience=cfg.patience_seconds,
        )
        # A set without a split for evaluation can be pretrained on; evaluating on it says what is missing.
        dataset.check(cfg.train, *(name for name in (cfg.val,) if name in dataset.manifest.splits))
        return dataset

    @property
    def place(self) -> Folder:
        """The folder of the shards, for those who read more of it than samples."""
        return self._shards.folder

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, by label; nothing if samples have no labels."""
        return self.manifest.classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of training pixels in [0, 1], one value per channel or one for all. Errors: DataError if not known."""
        return self._known("mean", self._statistics[0] or self.manifest.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of training pixels in [0, 1], as ``mean``."""
        values = self._known("std", self._statistics[1] or self.manifest.std)
        if min(values) <= 0:
            raise DataError(
                f"{self.folder}: the std in {NAME} is {list(values)}, not above 0; set data.mean and data.std"
            )
        return values * (self.channels // len(values))

    def samples(self, split: str) -> int:
        """Samples in a split."""
        return self._split(split).samples

    def counts(self, split: str) -> np.ndarray:
        """Samples per shard of a split, int64 [S]."""
        return np.array([shard.samples for shard in self._split(split).shards], dtype=np.int64)

    def digest(self, split: str) -> str:
        """sha256 of what a split's samples are: their keys, sizes and labels, wherever the shards lie."""
        return hashlib.sha256("".join(shard.index for shard in self._split(split).shards).encode()).hexdigest()

    def labels(self, split: str) -> np.ndarray:
        """Labels of all samples of a split, int64 [N]; -1 where there is none. Errors: DataError for one of no class."""
        shards = range(len(self._split(split).shards))
        labels = np.concatenate([self.index(split, number).labels for number in shards])
        if self.classes and labels.max() >= len(self.classes):
            raise DataError(
                f"{self.index_folder}: split '{split}' has label {labels.max()}, and {NAME} has {len(self.classes)} "
                f"classes: run `foveal data verify {self.folder}`"
            )
        return labels

    def class_counts(self, split: str) -> np.ndarray:
        """Samples of every class of a split, int64 [classes]."""
        labels = self.labels(split)
        return np.bincount(labels[labels >= 0], minlength=len(self.classes or ()))

    def check(self, *splits: str) -> None:
        """See that every shard of these splits is there with the size that the manifest says, and so is its index.

        What a server does not list (HTTP) is checked when it arrives.
        """
        wanted = [shard for split in splits for shard in self._split(split).shards]
        names = {shard.file for shard in wanted}
        found = _listed(self._shards, names)
        indices = found if self._indices is self._shards else _listed(self._indices, {f"{n}{SUFFIX}" for n in names})
        again = f"run `foveal data index {self.folder}{_elsewhere(self.folder, self.index_folder)}`"
        for shard in wanted:
            where = self._shards.folder.where(shard.file)
            if self._cache and self._cache.limit < shard.bytes:
                raise DataError(f"{where} has {shard.bytes / 1e9:.3g} GB, more than data.cache.gigabytes: raise that")
            if found is not None and shard.file not in found:
                _answer(self._shards, shard.file)
                raise DataError(f"{where} is missing, and {NAME} lists it: restore it, or index the folder again")
            size = (found or {}).get(shard.file)
            if size not in (None, shard.bytes):
                raise DataError(f"{where} has {size} bytes and {NAME} says {shard.bytes}: restore it, or {again} again")
            if indices is not None and f"{shard.file}{SUFFIX}" not in indices:
                _answer(self._indices, f"{shard.file}{SUFFIX}")
                raise DataError(f"{where} has no index in {self.index_folder}: {again}")

    def where(self, split: str, number: int) -> str:
        """The path or URL of the n-th shard of a split, for sentences."""
        return self._shards.folder.where(self._split(split).shards[number].file)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the shard with this file name. Errors: DataError that names it."""
        return self._shards.read(shard, offset, size)

    def vouch(self, split: str, number: int) -> None:
        """See, once, that the bytes of the n-th shard of a split have the sha256 that the manifest knows, if it does.

        Errors: DataError if they have not.
        """
        shard = self._split(split).shards[number]
        with self._vouching:
            if shard.sha256 is not None and shard.file not in self._vouched:
                self._shards.vouch(shard)
                self._vouched.add(shard.file)

    def prefetch(self, split: str, shards: Sequence[int]) -> None:
        """Let shards that lie behind a URL be copied in the background, in this order; never raises.

        Another call replaces what has not begun. What is named stays in the cache, as far as it holds that much.
        """
        if self._prefetch is None:
            return
        listed = self._split(split).shards
        files = [
            each for n in shards for each in (self._indices.wanted_index(listed[n]), self._shards.wanted(listed[n]))
        ]
        self._prefetch.ask([each for each in files if each is not None])

    def pulse(self) -> int:
        """Grows while bytes arrive from elsewhere; still where all is in folders."""
        return self._cache.pulse() if self._cache else 0

    def _split(self, split: str) -> Split:
        found = self.manifest.splits.get(split)
        if found is None or not found.samples:
            names = ", ".join(f"'{name}'" for name, other in self.manifest.splits.items() if other.samples) or "none"
            state = "is empty" if found else "does not exist"
            raise DataError(f"{self.folder}: split '{split}' {state}; splits with samples: {names}")
        return found

    def _known(self, name: str, values: tuple[float, ...] | None) -> tuple[float, ...]:
        if values is None:
            raise DataError(f"{self.folder}: {NAME} has no pixel statistics; set data.mean and data.std")
        if len(values) not in (1, self.channels):
            raise DataError(
                f"{self.folder}: the {name} in {NAME} has {len(values)} values for data.channels={self.channels}; "
                f"set data.mean and data.std"
            )
        return values


def open_folder(
    path: str,
    index: str | None,
    *,
    channels: int = 3,
    statistics: Statistics = (None, None),
    cache: CacheConfig | None = None,
    patience: float = 600.0,
) -> Dataset:
    """The data set of a folder or URL, its shards not yet checked; ``statistics`` go before the manifest's.

    cache: where copies of remote files are kept; patience: seconds to wait for data that does not move.
    Errors: as ``Dataset.open``.
    """
    folder = expanded(path, "data.path").rstrip("/") or "/"
    beside = folder if index is None else expanded(index, "data.index").rstrip("/") or "/"
    remotes = {place: Remote(place, patience) for place in {folder, beside} if is_remote(place)}
    if beside in remotes:
        manifest = _remote_manifest(remotes[beside], folder)
    else:
        manifest = answered(Path(beside) / NAME, patience, lambda: _manifest_of(folder, Path(beside)))
    copies = cache_of(cache or CacheConfig(), patience) if remotes else None
    shards = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    readers: dict[str, Reader] = {
        place: (
            CachedReader(remotes[place], copies, shards)
            if copies and place in remotes
            else LocalReader(place, patience)
        )
        for place in {folder, beside}
    }

    @functools.lru_cache(maxsize=_OPEN_INDICES)
    def opened(split: str, number: int) -> ShardIndex:
        return readers[beside].index(manifest.splits[split].shards[number])

    return Dataset(
        folder=readers[folder].folder.where(),
        index_folder=readers[beside].folder.where(),
        manifest=manifest,
        index=opened,
        channels=channels,
        _shards=readers[folder],
        _indices=readers[beside],
        _cache=copies,
        _prefetch=Prefetch(copies) if copies else None,
        _statistics=statistics,
    )


def _listed(place: Reader, wanted: set[str]) -> dict[str, int | None] | None:
    """The files of a folder and their sizes; None if it is read but not listed, or what is listed is another thing."""
    try:
        found = place.folder.sizes()
    except NotThere:
        return None
    is_a_page = None in found.values()  # of links: those of a site's front page, perhaps
    return None if is_a_page and wanted.isdisjoint(found) else found


def _answer(place: Reader, name: str) -> None:
    """Wait for a name that is no plain file, and may never answer. Errors: Unreachable."""
    if is_remote(place.folder.where()):
        return
    try:
        place.folder.read(name, 0, 1)
    except Unreachable:
        raise
    except DataError:
        return


def _remote_manifest(remote: Remote, folder: str) -> Manifest:
    try:
        return parse_manifest(remote.read(NAME, 0, remote.size(NAME)), remote.where(NAME))
    except NotThere as error:
        raise DataError(
            f"{error}: run `foveal data index {redact_urls(folder)} --index "
            f"FOLDER` and set data.index to that folder, or correct data.path"
        ) from None


def _elsewhere(folder: str, index: str) -> str:
    """How `foveal data index` is told where the index of a folder is, if not beside it."""
    return "" if folder == index else f" --index {index}"


def _manifest_of(folder: str, beside: Path) -> Manifest:
    if not is_remote(folder) and not Path(folder).is_dir():
        raise DataError(f"data.path: no such folder: {folder}")
    try:
        return read_manifest(beside)
    except OSError as error:
        if error.errno in AWAY:
            raise
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{beside / NAME} cannot be read ({error})") from None
    if is_remote(folder):
        url = redact_urls(folder)
        raise DataError(f"{url}: no {NAME} in {beside}; run `foveal data index {url} --index {beside}`")
    elsewhere = _elsewhere(folder, str(beside))
    if any(Path(folder).glob("*.tar")):
        raise DataError(f"{folder}: these shards have no index; run `foveal data index {folder}{elsewhere}`")
    if any(Path(folder).glob("*.tar.*")):
        raise DataError(f"{folder}: these shards are compressed, which has no random access; unpack and index them")
    raise DataError(f"{folder}: no {NAME} and no shards (*.tar) here; run `foveal data pack` or correct data.path")
