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

from foveal.atomic import fsync
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.format.shard_index import write_index
from foveal.data.indexing.index import index_shard, make_manifest_split
from foveal.data.pack.atomic_folder import atomic_dataset_folder, is_packed
from foveal.data.pack.encode import EncodedSample, PixelMoments, SkippedSample, compute_pixel_stats, encode_sample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSplit
from foveal.data.tools.progress_bar import progress_bar
from foveal.errors import DataError

SKIPPED_FILE_NAME = "skipped.txt"  # split, place and reason of every image that was left out

_STATISTICS = 4096  # training images that mean and std are estimated from
_AHEAD = 4  # samples in memory for each thread
_BLOCK, _RECORD = 512, 10240  # bytes that tar counts in
_BUFFER = 1 << 20

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass
class _PackNotes:
    """What is learned about a set while its shards are written."""

    fields: dict[str, None] = field(default_factory=dict)  # as they first appear
    moments: list[PixelMoments] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def write_dataset(output_folder: Path, load_dataset: Callable[[], PackDataset], options: PackOptions) -> bool:
    """Write a data set unless the folder holds one already; returns whether it was written now.

    make: lists what is to be written; not called if there is nothing to do.
    Raises: DataError from the source, for a folder that holds something else, or if nothing is left to write.
    """
    if is_packed(output_folder):
        return False
    contents = load_dataset()
    training = "train" if "train" in contents.splits else next(iter(contents.splits))
    with atomic_dataset_folder(output_folder) as draft:
        splits, notes = {}, _PackNotes()
        for split, part in contents.splits.items():
            measured = _STATISTICS if split == training and contents.pixel_stats is None else 0
            splits[split] = _write_split(draft, split, part, options, measured, notes)
        if notes.skipped:
            (draft / SKIPPED_FILE_NAME).write_text("".join(notes.skipped), errors="backslashreplace")
        mean, std = contents.pixel_stats or compute_pixel_stats(notes.moments)
        manifest = Manifest(
            name=options.name or contents.name,
            fields=tuple(notes.fields),
            classes=contents.classes,
            mean=mean,
            std=std,
            splits=splits,
        )
        write_manifest(manifest, draft)
    return True


def map_in_order(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], workers: int, max_pending_per_worker: int = _AHEAD
) -> Generator[ResultT, None, None]:
    """``map`` by threads: the results in the order of the items, at most ``ahead`` per thread of them waiting."""
    with ThreadPoolExecutor(workers, "pack") as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= workers * max_pending_per_worker:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_split(
    draft: Path, split: str, part: PackSplit, recipe: PackOptions, measured: int, notes: _PackNotes
) -> Split:
    """The shards and indices of a split; mean and std are of its first ``measured`` images that decode."""
    shards: list[Shard] = []
    with closing(_encode_split(split, part, recipe, measured, notes)) as ready:
        for number, (_, group) in enumerate(
            itertools.groupby(_assign_shards(ready, part, recipe), lambda pair: pair[0])
        ):
            file = draft / f"{split}-{number:06d}.tar"
            sha256 = _write_shard(file, (sample for _, sample in group))
            # Not with the names of the classes: one may be called 1, and that is not the label 1.
            index = index_shard(str(draft), file.name)
            write_index(index, draft / f"{file.name}.index")
            shards += make_manifest_split([index], [sha256]).shards
            notes.fields.update(dict.fromkeys(index.fields))
    if not shards:
        raise DataError(f"no image of the split '{split}' decodes: {len(part.sample_numbers)} were tried")
    return Split(samples=sum(shard.samples for shard in shards), shards=tuple(shards))


def _encode_split(
    split: str, part: PackSplit, recipe: PackOptions, measured: int, notes: _PackNotes
) -> Generator[tuple[int, EncodedSample], None, None]:
    """(place in the split, sample) for every image that goes into a shard; the others are noted."""

    def work(place: int) -> EncodedSample | SkippedSample:
        return encode_sample(part.get_sample(int(part.sample_numbers[place])), recipe, place < measured)

    count = len(part.sample_numbers)
    with progress_bar(f"packing {split}") as done:
        for place, sample in enumerate(map_in_order(work, range(count), recipe.workers)):
            done(place + 1, count)
            if isinstance(sample, SkippedSample):
                notes.skipped.append(f"{split}\t{sample.location}\t{sample.reason}\n")
                continue
            if sample.moments is not None:
                notes.moments.append(sample.moments)
            yield place, sample


def _assign_shards(
    ready: Iterator[tuple[int, EncodedSample]], part: PackSplit, recipe: PackOptions
) -> Iterator[tuple[int, EncodedSample]]:
    """Samples with a number that grows where a new shard begins."""
    if recipe.samples_per_shard is not None:
        parts = -(-len(part.sample_numbers) // recipe.samples_per_shard)
        ends = np.cumsum([len(each) for each in np.array_split(part.sample_numbers, parts)])
        for place, sample in ready:
            yield int(np.searchsorted(ends, place, side="right")), sample
        return
    number, size = 0, 0
    for _, sample in ready:
        added = sum(_BLOCK + _round_up(len(data), _BLOCK) for data in _tar_members(sample).values())
        if size and _round_up(size + added + 2 * _BLOCK, _RECORD) > recipe.shard_mb * 1e6:
            number, size = number + 1, 0
        size += added
        yield number, sample


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _tar_members(sample: EncodedSample) -> dict[str, bytes]:
    """What stands in the tar under a sample's key; without a label there is no `cls`."""
    label = {} if sample.label < 0 else {"cls": str(sample.label).encode()}
    return {sample.field: sample.data, **label}


def _write_shard(file: Path, samples: Iterable[EncodedSample]) -> str:
    """Write one tar in which nothing depends on when or by whom; its sha256."""
    from webdataset.writer import TarWriter  # 0.3 s of import that only packing needs

    with file.open("wb", _BUFFER) as raw:
        stream = _HashingWriter(raw)
        with TarWriter(
            stream,  # pyright: ignore[reportArgumentType] - a pipe would do, and that is what it is
            user="",
            group="",
            mtime=0,
            encoder=False,
            compress=False,
        ) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, **_tar_members(sample)})
    fsync(file)
    return stream.digest.hexdigest()


class _HashingWriter:
    """A file that is only written, and its sha256 on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)
