"""`foveal data verify`: checks of a data set against its manifest, its sha256 digests and an image decoder."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np

from foveal.data.config import is_url
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import MANIFEST_NAME, Shard, write_manifest
from foveal.data.format.shard_index import IndexRules, ShardIndex
from foveal.data.image.decode import UndecodableError, decode_image
from foveal.data.image.targets import LabelSurvey
from foveal.data.indexing.shards import scan_shard_stream
from foveal.data.storage.folder import Folder
from foveal.errors import DataError

_IMAGES_PER_JOB = 32  # images per decoding job
_PARALLEL_SHARDS = 2  # one is fetched and hashed while the images of the other are decoded

ShardFindings = tuple[list[str], str | None]  # faults of a shard, and its sha256 if it was computed


def verify_dataset(
    dataset: Dataset,
    *,
    full: bool,
    workers: int,
    label_surveys: Mapping[str, Sequence[LabelSurvey]] = MappingProxyType({}),
    require_labels: bool = True,
    record_missing_checksums: bool = False,
    on_progress: Callable[[int, int], None] = lambda _finished, _total: None,
) -> list[str]:
    """Return the faults of a data set, one sentence each, in the order of its splits and shards.

    Always: every shard has the size, and its index the digest and count, in the manifest. full: also check sha256 and
    tar headers against the index, decode every image in ``workers`` threads, and read every label with each of
    ``label_surveys``, by split, which count them; a remote shard is downloaded to a temporary file while it is checked.
    require_labels: a sample without such a label is a fault; else it is counted. record_missing_checksums: if there are no faults, write
    missing sha256 into the manifest. on_progress: called with the numbers of finished and of all shards.
    Raises: DataError if the folder cannot be listed or the manifest cannot be written.
    """
    if record_missing_checksums and is_url(dataset.index_folder):
        raise DataError(
            f"{dataset.index_folder} is a URL, {MANIFEST_NAME} can only be written into a folder: copy it first"
        )
    sizes = dataset.shard_folder.file_sizes()
    shards = [(split, n) for split, entry in dataset.manifest.splits.items() for n in range(len(entry.shards))]
    faults: list[str] = []
    sha256_of_shards: dict[tuple[str, int], str | None] = {}
    parallel_shards = _PARALLEL_SHARDS if full else workers
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(parallel_shards) as pool:
        verifier = _ShardVerifier(
            dataset,
            dataset.shard_folder,
            sizes,
            decoders,
            full,
            record_missing_checksums,
            label_surveys,
            require_labels,
        )
        findings = pool.map(verifier.verify_shard, shards)
        for (split, number), (shard_faults, sha256) in zip(shards, findings, strict=True):
            faults += shard_faults
            sha256_of_shards[split, number] = sha256
            on_progress(len(sha256_of_shards), len(shards))
    for split, surveys in label_surveys.items():
        for survey in surveys:
            findings = survey.content_findings(is_complete=True) if survey.num_labels else ()
            sentences = [found.sentence for found in findings if found.severity == "fault"]
            faults += [f"{dataset.folder}: split '{split}', .{survey.field}: {sentence}" for sentence in sentences]
    if record_missing_checksums and not faults:
        _record_checksums(dataset, sha256_of_shards)
    return faults


@dataclass(frozen=True)
class _ShardVerifier:
    dataset: Dataset
    folder: Folder
    sizes: dict[str, int | None]
    decoders: ThreadPoolExecutor
    full: bool
    record_missing_checksums: bool
    label_surveys: Mapping[str, Sequence[LabelSurvey]]
    require_labels: bool

    def verify_shard(self, split_and_number: tuple[str, int]) -> ShardFindings:
        split, number = split_and_number
        shard = self.dataset.manifest.splits[split].shards[number]
        path = self.folder.display_path(shard.file)
        try:
            size_faults = self._check_size(shard, path)
            index, index_faults = self._check_index(split, number, shard, path)
            # If the size is wrong, these are not the bytes that the index describes.
            byte_faults, sha256 = ([], None) if size_faults else self._check_bytes(split, shard, path, index)
        except DataError as error:
            return [str(error)], None
        except OSError as error:
            return [f"{path} cannot be read ({error})"], None
        return [*size_faults, *index_faults, *byte_faults], sha256

    def _check_size(self, shard: Shard, path: str) -> list[str]:
        if shard.file not in self.sizes:
            return [f"{path} is missing, and {MANIFEST_NAME} lists it"]
        size = self.sizes[shard.file]
        size = self.folder.file_size(shard.file) if size is None else size
        return [f"{path} has {size} bytes and {MANIFEST_NAME} says {shard.bytes}"] if size != shard.bytes else []

    def _check_index(self, split: str, number: int, shard: Shard, path: str) -> tuple[ShardIndex | None, list[str]]:
        """Return the index of a shard, or None if it is unusable, and its faults."""
        try:
            index = self.dataset.shard_index(split, number)
        except DataError as error:
            return None, [str(error)]
        if index.compute_checksum() != index.checksum or index.compute_samples_digest() != shard.index:
            return None, [f"{path}: its index is damaged, its checksum does not match its content"]
        faults = [index.note] if index.note else []
        if (index.shard, index.bytes) != (shard.file, shard.bytes):
            faults.append(f"{path}: its index was made from {index.shard} of {index.bytes} bytes")
        if unknown_fields := set(index.fields) - set(self.dataset.manifest.fields):
            faults.append(f"{path}: {MANIFEST_NAME} does not list its members {', '.join(sorted(unknown_fields))}")
        num_classes = len(self.dataset.classes or ())
        if len(outside := np.flatnonzero(index.labels >= num_classes)):
            first = int(outside[0])
            faults.append(
                f"{path}: {len(outside)} labels are not among the {num_classes} classes of {MANIFEST_NAME}, "
                f"the first is {index.labels[first]}, of '{index.key(first)}'"
            )
        return index, faults

    def _check_bytes(self, split: str, shard: Shard, path: str, index: ShardIndex | None) -> ShardFindings:
        """Compute a shard's sha256 if it is needed; in full mode also check headers and images."""
        if not self.full and (not self.record_missing_checksums or shard.sha256):
            return [], None
        digest = hashlib.sha256()
        with self._open_hashed(shard, digest.update) as stream:
            sha256, faults = digest.hexdigest(), []
            if shard.sha256 not in (None, sha256):
                faults.append(f"{path} is damaged, its sha256 is {sha256} and {MANIFEST_NAME} says {shard.sha256}")
            if self.full and index is not None:
                headers = self._check_headers(stream, path, index, damaged=bool(faults))
                faults += [*headers, *self._check_samples(split, stream, path, index)]
        return faults, sha256

    @contextmanager
    def _open_hashed(self, shard: Shard, consume: Callable[[bytes], None]) -> Iterator[IO[bytes]]:
        """Pass all bytes of a shard to ``consume``, then yield the shard as an open local file."""
        chunks = self.folder.iter_chunks(shard.file, shard.bytes)
        if not is_url(self.dataset.folder):
            for chunk in chunks:
                consume(chunk)
            with self.folder.open_file(shard.file) as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as stream:
            for chunk in chunks:
                consume(chunk)
                stream.write(chunk)
            stream.flush()
            yield stream

    def _check_headers(self, stream: IO[bytes], path: str, index: ShardIndex, *, damaged: bool) -> list[str]:
        """Scan the tar by the rules of its index and compare the result with the index."""
        label_key, classes = index.rules["label_key"], index.rules["classes"] and self.dataset.classes
        numeric_labels = index.rules.get("numeric_labels")
        rules = IndexRules(
            classes or None,
            str(label_key) if label_key else None,
            bool(index.rules["dotted_keys"]),
            index.image_field,
            index.image_order,
            str(numeric_labels) if numeric_labels else None,
        )
        try:
            fresh = scan_shard_stream(stream, path, index.shard, rules)
        except DataError as error:
            return [str(error)]
        same = (fresh.fields, fresh.compute_samples_digest()) == (index.fields, index.compute_samples_digest())
        if damaged or (same and np.array_equal(fresh.offsets, index.offsets)):
            return []  # damaged bytes prove nothing about the index
        return [
            f"{path}: its members or labels are not those that its index was made from: `foveal data index --again`"
        ]

    def _check_samples(self, split: str, stream: IO[bytes], path: str, index: ShardIndex) -> Iterator[str]:
        """Decode every image of a shard, and read every label, in parallel; yield the faults."""
        surveys = self.label_surveys.get(split, ())

        def check_samples(rows: range) -> list[str]:
            return [fault for row in rows for fault in self._check_sample(surveys, stream.fileno(), path, index, row)]

        jobs = [
            range(start, min(start + _IMAGES_PER_JOB, len(index))) for start in range(0, len(index), _IMAGES_PER_JOB)
        ]
        for faults in self.decoders.map(check_samples, jobs):
            yield from faults

    def _check_sample(
        self, surveys: Sequence[LabelSurvey], descriptor: int, path: str, index: ShardIndex, row: int
    ) -> Iterator[str]:
        """Yield the faults of a sample's image and labels."""
        stated = surveys[0].field if self.require_labels and surveys else None
        try:
            offset, size = index.find_image_offset_size(row, stated)
        except DataError as error:  # the label is the only picture
            yield str(error)
            return
        try:
            image = decode_image(os.pread(descriptor, size, offset), 3, bit_depth=self.dataset.manifest.bit_depth)
        except UndecodableError as error:
            yield f"{path}: the image of '{index.key(row)}' does not decode ({error})"
            return
        location = f"{path}: sample '{index.key(row)}'"
        for survey in surveys:
            member = index.find_member_offset_size(row, survey.field)
            if member is None:
                if self.require_labels:
                    yield f"{location} has no member .{survey.field}, which is its label"
                else:
                    survey.add_missing()
                continue
            offset, size = member
            try:
                survey.add(os.pread(descriptor, size, offset), image.size, location)
            except UndecodableError as error:
                yield f"{location} does not decode ({error})"
            except DataError as error:
                yield str(error)


def _record_checksums(dataset: Dataset, sha256_of_shards: dict[tuple[str, int], str | None]) -> None:
    """Write the computed sha256 into the manifest."""
    splits = {
        split: entry.model_copy(
            update={
                "shards": tuple(
                    replace(shard, sha256=shard.sha256 or sha256_of_shards[split, number])
                    for number, shard in enumerate(entry.shards)
                )
            }
        )
        for split, entry in dataset.manifest.splits.items()
    }
    folder = Path(dataset.index_folder)
    try:
        write_manifest(dataset.manifest.model_copy(update={"splits": splits}), folder)
    except OSError as error:
        raise DataError(f"{folder / MANIFEST_NAME} cannot be written ({error})") from None
