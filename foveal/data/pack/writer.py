"""Writing of shards: many threads read and encode samples, one thread writes them in order."""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from foveal.atomic import fsync
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.format.shard_index import write_index
from foveal.data.image.decode import UndecodableError, read_image_size
from foveal.data.image.targets import LabelSurvey
from foveal.data.indexing.index import build_shard_index, make_manifest_split
from foveal.data.pack.atomic_folder import atomic_new_dataset_folder, is_packed
from foveal.data.pack.encode import (
    EncodedSample,
    PixelMoments,
    SkippedSample,
    compute_pixel_stats,
    encode_sample,
    read_label_data,
)
from foveal.data.pack.label_member import LabelMember, describe_survey
from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import (
    PackSource,
    check_same_pack,
    compute_fingerprint,
    make_record,
    read_record,
    write_record,
)
from foveal.data.pack.source import PackDataset, PackSplit, describe_dataset, spread_numbers
from foveal.data.tools.progress_bar import progress_bar
from foveal.errors import DataError

SKIPPED_FILE_NAME = "skipped.txt"  # split, location and reason of every skipped image

_NUM_LABELS_LOOKED_AT = 64  # per split, before hours of packing
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
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    label_member: LabelMember | None = None
    label_surveys: dict[str, LabelSurvey] = field(default_factory=dict)

    def describe_image_sizes(self) -> tuple[str, ...]:
        """Return a sentence about the sizes of the images that were decoded for the pixel statistics."""
        if not self.image_sizes:
            return ()
        of_all = f"{len(self.image_sizes):,} training images"
        if len(set(self.image_sizes)) == 1:
            width, height = self.image_sizes[0]
            return (f"sizes: {width} x {height} pixels ({of_all})",)
        shorter = [min(size) for size in self.image_sizes]
        longer = max(max(size) for size in self.image_sizes)
        sides = f"shorter side {min(shorter):,} to {max(shorter):,} pixels, median {np.median(shorter):,.0f}"
        return (f"sizes: {sides}; longer side up to {longer:,} ({of_all})",)


def write_dataset_if_absent(
    output_folder: Path, source: PackSource, load_dataset: Callable[[], PackDataset], options: PackOptions
) -> bool:
    """Write a data set unless the folder holds it; return whether it was written now.

    load_dataset: lists the samples; called if the data set is to be written, or to be compared with the one there.
    Raises: DataError from the source, if the folder holds other files or another data set, if no image of a split
    decodes, or if labels cannot be meant as they are.
    """
    if is_packed(output_folder):
        check_same_pack(output_folder, source, options, load_dataset)
        return False
    dataset = load_dataset()
    fingerprint = None if source.path is None else compute_fingerprint(dataset)
    if dataset.label_member is not None:
        _check_some_labels(dataset, dataset.label_member)
    training_split = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    with atomic_new_dataset_folder(output_folder) as draft:
        splits: dict[str, Split] = {}
        report = _PackReport(label_member=dataset.label_member)
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
            bit_depth=options.bit_depth,
            splits=splits,
        )
        summary = (*dataset.summary, *report.describe_image_sizes())
        notes = (*describe_dataset(dataset), *_describe_labels(report))
        record = make_record(source, options, fingerprint, summary, notes)
        write_record(record, draft)
        write_manifest(manifest, draft)
    if read_record(output_folder) != record:  # another process packed this folder meanwhile, and was faster
        check_same_pack(output_folder, source, options, lambda: dataset)
    return True


def _check_some_labels(dataset: PackDataset, label_member: LabelMember) -> None:
    """Raise DataError if some labels of each split are wrong, or cannot be meant as they are read."""
    for name, split in dataset.splits.items():
        survey = label_member.reader.make_survey()
        for number in spread_numbers(split, _NUM_LABELS_LOOKED_AT):
            sample = split.get_sample(number)
            with suppress(OSError, UndecodableError):  # counted by the survey, or named when it is packed
                read_label_data(sample, read_image_size(sample.read_bytes()), label_member, survey)
        faults = [found.sentence for found in survey.findings(is_complete=False) if found.severity == "fault"]
        if faults:
            raise DataError(label_member.explain(f"split '{name}': {faults[0]}"))


def _describe_labels(report: _PackReport) -> list[str]:
    """Return what the labels of all splits hold, and what a reader should know of them. Raises: DataError."""
    if report.label_member is None:
        return []
    notes: list[str] = []
    for name, survey in report.label_surveys.items():
        if faults := describe_survey(name, survey, severities=("fault",)):
            raise DataError(report.label_member.explain(faults[0]))
        notes.append(f"split '{name}': {survey.summary()}")
        notes += describe_survey(name, survey, severities=("untrainable", "note"))
    return [*notes, *report.label_member.notes()]


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
        numbered_samples = _assign_shards(samples, split, options, report.label_member)
        for number, (_, group) in enumerate(itertools.groupby(numbered_samples, lambda pair: pair[0])):
            file = draft / f"{name}-{number:06d}.tar"
            sha256 = _write_shard(file, (_tar_members(sample, report.label_member) for _, sample in group))
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
    member = report.label_member
    survey = None if member is None else report.label_surveys.setdefault(name, member.reader.make_survey())

    def encode(position: int) -> EncodedSample | SkippedSample:
        sample = split.get_sample(int(split.sample_numbers[position]))
        return encode_sample(sample, options, position < num_measured, member, survey)

    count = len(split.sample_numbers)
    with progress_bar(f"packing {name}") as on_progress:
        for position, sample in enumerate(map_in_order(encode, range(count), options.workers)):
            on_progress(position + 1, count)
            if isinstance(sample, SkippedSample):
                report.skipped.append(f"{name}\t{sample.location}\t{sample.reason}\n")
                continue
            if sample.moments is not None and sample.size is not None:
                report.moments.append(sample.moments)
                report.image_sizes.append(sample.size)
            yield position, sample


def _assign_shards(
    samples: Iterator[tuple[int, EncodedSample]],
    split: PackSplit,
    options: PackOptions,
    label_member: LabelMember | None,
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
        added = sum(_BLOCK + _round_up(len(data), _BLOCK) for data in _tar_members(sample, label_member)[1].values())
        if size and _round_up(size + added + 2 * _BLOCK, _RECORD) > options.shard_mb * 1e6:
            shard, size = shard + 1, 0
        size += added
        yield shard, sample


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _tar_members(sample: EncodedSample, label_member: LabelMember | None) -> tuple[str, dict[str, bytes]]:
    """Return key and tar members of a sample.

    `cls` holds its class, `json` several classes, ``label_member`` any other label; without a label there is no member.
    """
    members = {sample.field: sample.data}
    if isinstance(sample.label, tuple):
        members["json"] = json.dumps({"labels": sample.label}).encode()
    elif sample.label >= 0:
        members["cls"] = str(sample.label).encode()
    if label_member is not None and sample.label_data is not None:
        members[label_member.field] = sample.label_data
    return sample.key, members


def _write_shard(file: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> str:
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
            for key, members in samples:
                tar.write({"__key__": key, **members})
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
