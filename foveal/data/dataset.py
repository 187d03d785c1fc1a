"""A data set that is there: manifest, shards and indices checked, before anything trains on it."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foveal.data.config import DataConfig, expanded, is_remote
from foveal.data.manifest import NAME, Manifest, Split, read_manifest
from foveal.data.reader import Read, file_sizes, reader
from foveal.data.shardindex import ShardIndex, open_index
from foveal.errors import ConfigError, DataError

Statistics = tuple[tuple[float, ...] | None, tuple[float, ...] | None]  # mean and std

_OPEN_INDICES = 256


@dataclass(frozen=True)
class Dataset:
    """Shards with their manifest. Sample ids are positions in a split, in the order of its shards.

    read: bytes of a shard; index: the mapped index of the n-th shard of a split. Both serve any number of threads.
    """

    folder: str
    index_folder: Path
    manifest: Manifest
    read: Read
    index: Callable[[str, int], ShardIndex]
    channels: int
    _statistics: Statistics

    @classmethod
    def open(cls, cfg: DataConfig) -> "Dataset":
        """Open the shards that ``cfg`` names and check those of its two splits.

        Errors: DataError in one sentence if folder, manifest, index, split or a shard is missing, empty or stale;
        ConfigError if an environment variable in a path is not set.
        """
        dataset = open_folder(cfg.path, cfg.index, channels=cfg.channels, statistics=(cfg.mean, cfg.std))
        dataset.check(cfg.train)
        if (
            cfg.val in dataset.manifest.splits
        ):  # a set without one can be pretrained on; evaluating on it says what is missing
            dataset.check(cfg.val)
        return dataset

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
        """Labels of all samples of a split, int64 [N]; -1 where there is none."""
        shards = range(len(self._split(split).shards))
        return np.concatenate([self.index(split, number).labels for number in shards])

    def class_counts(self, split: str) -> np.ndarray:
        """Samples of every class of a split, int64 [classes]."""
        labels = self.labels(split)
        return np.bincount(labels[labels >= 0], minlength=len(self.classes or ()))

    def check(self, split: str) -> None:
        """See that every shard of a split is there with the size that the manifest says, and so is its index."""
        shards = self._split(split).shards
        try:
            found, indices = file_sizes(self.folder), file_sizes(str(self.index_folder))
        except OSError as error:
            raise DataError(f"{self.folder} cannot be listed ({error})") from None
        for shard in shards:
            where = f"{self.folder}/{shard.file}"
            size = found.get(shard.file)
            if size is None:
                raise DataError(f"{where} is missing, and {NAME} lists it: restore it, or index the folder again")
            if size != shard.bytes:
                raise DataError(
                    f"{where} has {size} bytes and {NAME} says {shard.bytes}: "
                    f"restore it, or run `foveal data index {self.folder}` again"
                )
            if f"{shard.file}.index" not in indices:
                raise DataError(f"{where} has no index in {self.index_folder}: run `foveal data index {self.folder}`")

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


def open_folder(path: str, index: str | None, *, channels: int = 3, statistics: Statistics = (None, None)) -> Dataset:
    """The data set of a folder or URL, its shards not yet checked; ``statistics`` go before the manifest's.

    Errors: as ``Dataset.open``.
    """
    folder = expanded(path, "data.path").rstrip("/") or "/"
    beside = folder if index is None else expanded(index, "data.index")
    if is_remote(beside):
        raise ConfigError(
            f"data.index: {beside} is a URL, an index is a local folder: "
            f"run `foveal data index {folder} --index FOLDER` and set data.index to it"
        )
    manifest = _manifest_of(folder, Path(beside))

    @functools.lru_cache(maxsize=_OPEN_INDICES)
    def opened(split: str, number: int) -> ShardIndex:
        shard = manifest.splits[split].shards[number]
        return open_index(Path(beside) / f"{shard.file}.index", shard.index, shard.samples)

    return Dataset(folder, Path(beside), manifest, reader(folder), opened, channels, statistics)


def _manifest_of(folder: str, beside: Path) -> Manifest:
    if not is_remote(folder) and not Path(folder).is_dir():
        raise DataError(f"data.path: no such folder: {folder}")
    try:
        return read_manifest(beside)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{beside / NAME} cannot be read ({error})") from None
    if is_remote(folder):
        raise DataError(f"{folder}: no {NAME} in {beside}; run `foveal data index {folder} --index {beside}`")
    elsewhere = "" if Path(folder) == beside else f" --index {beside}"
    if any(Path(folder).glob("*.tar")):
        raise DataError(f"{folder}: these shards have no index; run `foveal data index {folder}{elsewhere}`")
    if any(Path(folder).glob("*.tar.*")):
        raise DataError(f"{folder}: these shards are compressed, which has no random access; unpack and index them")
    raise DataError(f"{folder}: no {NAME} and no shards (*.tar) here; run `foveal data pack` or correct data.path")
