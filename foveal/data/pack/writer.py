"""The way from samples to a folder of shards: read and encoded by many threads, written in order by one."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from foveal.atomic import force
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.format.shard_index import write_index
from foveal.data.indexing.index import describe, index_shard
from foveal.data.pack.atomic_folder import drafted, is_packed
from foveal.data.pack.encode import Bad, Moments, Ready, prepare, statistics_of
from foveal.data.pack.options import Recipe
from foveal.data.pack.source import Contents, Part
from foveal.data.tools.progress_bar import bar
from foveal.errors import DataError

SKIPPED = "skipped.txt"  # split, place and reason of every image that was left out

_STATISTICS = 4096  # training images that mean and std are estimated from
_AHEAD = 4  # samples in memory for each thread
_BLOCK, _RECORD = 512, 10240  # bytes that tar counts in
_BUFFER = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Notes:
    """What is learned about a set while its shards are written."""

    fields: dict[str, None] = field(default_factory=dict)  # as they first appear
    moments: list[Moments] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def write(folder: Path, make: Callable[[], Contents], recipe: Recipe) -> bool:
    """Write a data set unless the folder holds one already; returns whether it was written now.

    make: lists what is to be written; not called if there is nothing to do.
    Errors: DataError from the source, for a folder that holds something else, or if nothing is left to write.
    """
    if is_packed(folder):
        return False
    contents = make()
    training = "train" if "train" in contents.parts else next(iter(contents.parts))
    with drafted(folder) as draft:
        splits, notes = {}, _Notes()
        for split, part in contents.parts.items():
            measured = _STATISTICS if split == training and contents.statistics is None else 0
            splits[split] = _write_split(draft, split, part, recipe, measured, notes)
        if notes.skipped:
            (draft / SKIPPED).write_text("".join(notes.skipped), errors="backslashreplace")
        mean, std = contents.statistics or statistics_of(notes.moments)
        manifest = Manifest(
            name=recipe.name or contents.name,
            fields=tuple(notes.fields),
            classes=contents.classes,
            mean=mean,
            std=std,
            splits=splits,
        )
        write_manifest(manifest, draft)
    return True


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = _AHEAD
) -> Generator[Result, None, None]:
    """``map`` by threads: the results in the order of the items, at most ``ahead`` per thread of them waiting."""
    with ThreadPoolExecutor(workers, "pack") as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= workers * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_split(draft: Path, split: str, part: Part, recipe: Recipe, measured: int, notes: _Notes) -> Split:
    """The shards and indices of a split; mean and std are of its first ``measured`` images that decode."""
    shards: list[Shard] = []
    with closing(_ready(split, part, recipe, measured, notes)) as ready:
        for number, (_, group) in enumerate(itertools.groupby(_numbered(ready, part, recipe), lambda pair: pair[0])):
            file = draft / f"{split}-{number:06d}.tar"
            sha256 = _write_shard(file, (sample for _, sample in group))
            # Not with the names of the classes: one may be called 1, and that is not the label 1.
            index = index_shard(str(draft), file.name)
            write_index(index, draft / f"{file.name}.index")
            shards += describe([index], [sha256]).shards
            notes.fields.update(dict.fromkeys(index.fields))
    if not shards:
        raise DataError(f"no image of the split '{split}' decodes: {len(part.numbers)} were tried")
    return Split(samples=sum(shard.samples for shard in shards), shards=tuple(shards))


def _ready(
    split: str, part: Part, recipe: Recipe, measured: int, notes: _Notes
) -> Generator[tuple[int, Ready], None, None]:
    """(place in the split, sample) for every image that goes into a shard; the others are noted."""

    def work(place: int) -> Ready | Bad:
        return prepare(part.sample(int(part.numbers[place])), recipe, place < measured)

    count = len(part.numbers)
    with bar(f"packing {split}") as done:
        for place, sample in enumerate(in_order(work, range(count), recipe.workers)):
            done(place + 1, count)
            if isinstance(sample, Bad):
                notes.skipped.append(f"{split}\t{sample.where}\t{sample.reason}\n")
                continue
            if sample.moments is not None:
                notes.moments.append(sample.moments)
            yield place, sample


def _numbered(ready: Iterator[tuple[int, Ready]], part: Part, recipe: Recipe) -> Iterator[tuple[int, Ready]]:
    """Samples with a number that grows where a new shard begins."""
    if recipe.samples_per_shard is not None:
        parts = -(-len(part.numbers) // recipe.samples_per_shard)
        ends = np.cumsum([len(each) for each in np.array_split(part.numbers, parts)])
        for place, sample in ready:
            yield int(np.searchsorted(ends, place, side="right")), sample
        return
    number, size = 0, 0
    for _, sample in ready:
        added = sum(_BLOCK + _padded(len(data), _BLOCK) for data in _members(sample).values())
        if size and _padded(size + added + 2 * _BLOCK, _RECORD) > recipe.shard_mb * 1e6:
            number, size = number + 1, 0
        size += added
        yield number, sample


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _members(sample: Ready) -> dict[str, bytes]:
    """What stands in the tar under a sample's key; without a label there is no `cls`."""
    label = {} if sample.label < 0 else {"cls": str(sample.label).encode()}
    return {sample.field: sample.data, **label}


def _write_shard(file: Path, samples: Iterable[Ready]) -> str:
    """Write one tar in which nothing depends on when or by whom; its sha256."""
    from webdataset.writer import TarWriter  # 0.3 s of import that only packing needs

    with file.open("wb", _BUFFER) as raw:
        stream = _Hashed(raw)
        with TarWriter(
            stream,  # pyright: ignore[reportArgumentType] - a pipe would do, and that is what it is
            user="",
            group="",
            mtime=0,
            encoder=False,
            compress=False,
        ) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, **_members(sample)})
    force(file)
    return stream.digest.hexdigest()


class _Hashed:
    """A file that is only written, and its sha256 on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)
