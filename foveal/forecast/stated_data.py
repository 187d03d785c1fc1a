"""A data set that is not at hand, as the command line states it: so many images of so many bytes, in equal classes.

Manifest and indices are written to a temporary folder beside shards without content, so that planning reads them as it
reads any data set. All shards of a size share one index.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, write_index

_SHARD_SAMPLES, _MAX_SHARDS = 10_000, 1000
_FIELD = "jpg"


@dataclass(frozen=True, slots=True)
class StatedData:
    """The number of training images, the bytes of one (None: not stated), and the number of classes (None: none)."""

    images: int
    bytes_per_image: int | None
    classes: int | None


@contextmanager
def open_stated_data(cfg: DataConfig, stated: StatedData) -> Iterator[DataConfig]:
    """Yield the settings of the stated data set, for a plan only: its images cannot be read. It is removed at the end.

    The evaluation split has a size of no meaning.
    """
    num_classes = stated.classes
    shard_samples = max(min(_SHARD_SAMPLES, stated.images), -(-stated.images // _MAX_SHARDS))
    full_shards, rest = divmod(stated.images, shard_samples)
    counts = [shard_samples] * full_shards + ([rest] if rest else [])
    with tempfile.TemporaryDirectory(prefix="foveal-stated-data-") as name:
        folder = Path(name)
        splits = {
            split: _write_split(folder, split, split_counts, stated.bytes_per_image or 1, num_classes)
            for split, split_counts in {cfg.val: counts[:1], cfg.train: counts}.items()
        }
        manifest = Manifest(
            name="stated",
            fields=(_FIELD,),
            classes=None if num_classes is None else tuple(f"class {number}" for number in range(num_classes)),
            mean=(0.5,),
            std=(0.25,),
            splits=splits,
        )
        write_manifest(manifest, folder)
        yield cfg.model_copy(update={"path": name, "index": None, "mix": ()})


def _write_split(folder: Path, split: str, counts: list[int], bytes_per_image: int, num_classes: int | None) -> Split:
    """Write the shards of a split, each with the file of its index; shards of one size share it."""
    shards: list[Shard] = []
    first_by_count: dict[int, Shard] = {}
    for number, count in enumerate(counts):
        file = f"{split}-{number:06d}.tar"
        if first := first_by_count.get(count):
            shard = Shard(file, count, first.bytes, index=first.index)
            (folder / f"{file}{INDEX_SUFFIX}").hardlink_to(folder / f"{first.file}{INDEX_SUFFIX}")
        else:
            index = _make_index(file, count, bytes_per_image, num_classes)
            write_index(index, folder / f"{file}{INDEX_SUFFIX}")
            shard = Shard(file, count, index.bytes, index=index.compute_samples_digest())
            first_by_count[count] = shard
        with (folder / file).open("wb") as stream:
            stream.truncate(shard.bytes)  # no block of the disk is used
        shards.append(shard)
    return Split(samples=sum(counts), shards=tuple(shards))


def _make_index(file: str, count: int, bytes_per_image: int, num_classes: int | None) -> ShardIndex:
    stored_bytes = BLOCKSIZE + -(-bytes_per_image // BLOCKSIZE) * BLOCKSIZE
    rows = np.arange(count, dtype="<i8")
    return ShardIndex(
        shard=file,
        bytes=count * stored_bytes,
        fields=(_FIELD,),
        offsets=(rows * stored_bytes + BLOCKSIZE)[:, None],
        sizes=np.full((count, 1), bytes_per_image, dtype="<i8"),
        labels=rows % num_classes if num_classes else np.full(count, -1, dtype="<i8"),
        key_ends=rows + 1,
        keys=np.full(count, ord("x"), dtype="u1"),
        rules=IndexRules().to_metadata(),
    )
