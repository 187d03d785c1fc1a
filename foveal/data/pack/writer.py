"""Writing of shards: many threads read and encode samples, one thread writes them in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from foveal.atomic import fsync
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.format.shard_index import write_index
from foveal.data.indexing.index import build_shard_index, make_manifest_split
from foveal.data.pack.atomic_folder import atomic_new_dataset_folder, is_packed
from foveal.data.pack.encode import EncodedSample, PixelMoments, SkippedSample, compute_pixel_stats, encode_sample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, PackSplit
from foveal.data.tools.progress_bar import progress_bar
from foveal.errors import DataError

SKIPPED_FILE_NAME = "skipped.txt"  # split, location and reason of every skipped image

_NUM_MEASURED = 4096  # training images that mean and std are estimated from
_PENDING_PER_WORKER = 4  # samples in memory per thread
_BLOCK, _RECORD = 512, 10240  # units of a tar in bytes
_BUFFER = 1 << 20

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass
class _PackReport:
    """Facts about a data set that are collected while its shards are written."""

    fields: dict[str, None] = field(default_factory=dict)  # in the order of their first appearance
    moments: list[PixelMoments] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def write_dataset_if_absent(output_folder: Path, load_dataset: Callable[[], PackDataset], options: PackOptions) -> bool:
    """Write a data set unless the folder holds one; return whether it was written now.

    load_dataset: lists the samples; only called if the data set is to be written.
    Raises: DataError from the source, if the folder holds other files, or if no image of a split decodes.
    """
    if is_packed(output_folder):
        return False
    dataset = load_dataset()
    training_split = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    with atomic_new_dataset_folder(output_folder) as draft:
        splits: dict[str, Split] = {}
        report = _PackReport()
        for name, split in dataset.splits.items():
            num_measured = _NUM_MEASURED if name == training_split and dataset.pixel_stats is None else 0
            splits[name] = _write_split(draft, name, split, options, num_measured, report)
        if report.skipped:
            (draft / SKIPPED_FILE_NAME).write_text("".join(report.skipped), errors="backslashreplace")
        mean, std = dataset.pixel_stats or compute_pixel_stats(report.moments)
        manifest = Manifest(
            name=options.name or dataset.name,
            fields=tuple(report.fields),
            classes=dataset.classes,
            mean=mean,
            std=std,
            splits=splits,
        )
        write_manifest(manifest, draft)
    return True


def map_in_order(
    function: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    workers: int,
    max_pending_per_worker: int = _PENDING_PER_WORKER,
) -> Generator[ResultT, None, None]:
    """Map with threads; yield results in the order of the items, with at most ``max_pending_per_worker`` pending."""
    with ThreadPoolExecutor(workers, "pack") as pool:
        futures: deque[Future[ResultT]] = deque()
        try:
            for item in items:
                futures.append(pool.submit(function, item))
                if len(futures) >= workers * max_pending_per_worker:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_split(
    draft: Path, name: str, split: PackSplit, options: PackOptions, num_measured: int, report: _PackReport
) -> Split:
    """Write the shards and indices of a split; report the moments of its first ``num_measured`` images that decode."""
    shards: list[Shard] = []
    with closing(_encode_split(name, split, options, num_measured, report)) as samples:
        numbered_samples = _assign_shards(samples, split, options)
        for number, (_, group) in enumerate(itertools.groupby(numbered_samples, lambda pair: pair[0])):
            file = draft / f"{name}-{number:06d}.tar"
            sha256 = _write_shard(file, (sample for _, sample in group))
            # Without the class names: a class may have the name 1, which is not label 1.
            index = build_shard_index(str(draft), file.name)
            write_index(index, draft / f"{file.name}.index")
            shards += make_manifest_split([index], [sha256]).shards
            report.fields.update(dict.fromkeys(index.fields))
    if not shards:
        raise DataError(f"no image of the split '{name}' decodes: {len(split.sample_numbers)} were tried")
    return Split(samples=sum(shard.samples for shard in shards), shards=tuple(shards))


def _encode_split(
    name: str, split: PackSplit, options: PackOptions, num_measured: int, report: _PackReport
) -> Generator[tuple[int, EncodedSample], None, None]:
    """Yield (position in the split, sample) of every image to be written; report the skipped images."""

    def encode(position: int) -> EncodedSample | SkippedSample:
        sample = split.get_sample(int(split.sample_numbers[position]))
        return encode_sample(sample, options, position < num_measured)

    count = len(split.sample_numbers)
    with progress_bar(f"packing {name}") as on_progress:
        for position, sample in enumerate(map_in_order(encode, range(count), options.workers)):
            on_progress(position + 1, count)
            if isinstance(sample, SkippedSample):
                report.skipped.append(f"{name}\t{sample.location}\t{sample.reason}\n")
                continue
            if sample.moments is not None:
                report.moments.append(sample.moments)
            yield position, sample


def _assign_shards(
    samples: Iterator[tuple[int, EncodedSample]], split: PackSplit, options: PackOptions
) -> Iterator[tuple[int, EncodedSample]]:
    """Yield (shard number, sample). A number may be skipped: its samples do not decode."""
    if options.samples_per_shard is not None:
        num_shards = -(-len(split.sample_numbers) // options.samples_per_shard)
        ends = np.cumsum([len(chunk) for chunk in np.array_split(split.sample_numbers, num_shards)])
        for position, sample in samples:
            yield int(np.searchsorted(ends, position, side="right")), sample
        return
    shard, size = 0, 0
    for _, sample in samples:
        added = sum(_BLOCK + _round_up(len(data), _BLOCK) for data in _tar_members(sample).values())
        if size and _round_up(size + added + 2 * _BLOCK, _RECORD) > options.shard_mb * 1e6:
            shard, size = shard + 1, 0
        size += added
        yield shard, sample


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _tar_members(sample: EncodedSample) -> dict[str, bytes]:
    """Return the tar members of a sample; without a label there is no `cls`."""
    label = {} if sample.label < 0 else {"cls": str(sample.label).encode()}
    return {sample.field: sample.data, **label}


def _write_shard(file: Path, samples: Iterable[EncodedSample]) -> str:
    """Write one tar, whose bytes do not depend on time or user, and return its sha256."""
    from webdataset.writer import TarWriter  # imported here: 0.3 s that only packing needs

    with file.open("wb", _BUFFER) as raw:
        stream = _HashingWriter(raw)
        with TarWriter(
            stream,  # pyright: ignore[reportArgumentType] - TarWriter only writes, as to a pipe
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
    """A write-only file that computes the sha256 of its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)
