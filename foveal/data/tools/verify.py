"""What is wrong with a data set: its files against its manifest, its bytes against their digests and a decoder."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from foveal.data.config import is_remote
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import MANIFEST_NAME, Shard, write_manifest
from foveal.data.format.shard_index import IndexRules, ShardIndex
from foveal.data.image.decode import UndecodableError, decode_image
from foveal.data.indexing.index import scan_stream
from foveal.data.storage.folder import Folder
from foveal.errors import DataError

_IMAGES_PER_JOB = 32  # images that a thread decodes before it takes others
_SHARDS_AT_ONCE = 2  # one is fetched and hashed while the images of another are decoded

ShardFindings = tuple[list[str], str | None]  # what is wrong with a shard, and its sha256 where it was computed


def verify_dataset(
    dataset: Dataset,
    *,
    full: bool,
    workers: int,
    record_checksums: bool = False,
    on_progress: Callable[[int, int], None] = lambda _shards, _all: None,
) -> list[str]:
    """What is wrong with a data set, one sentence each, in the order of its splits and shards; nothing if all is well.

    Fast: every shard is there with the size, and its index with the digest and count, that the manifest says. Full:
    also sha256, tar headers against index, and every image decoded, in ``workers`` threads; a shard behind a URL is
    fetched into the temporary folder for as long as it is looked at. record: write the sha256 that the manifest does
    not have into it, if nothing is wrong. done: hears how many of all shards are.
    Raises: DataError if the folder cannot be listed or the manifest not be written.
    """
    if record_checksums and is_remote(dataset.index_folder):
        raise DataError(
            f"{dataset.index_folder} is a URL, {MANIFEST_NAME} can only be written into a folder: copy it first"
        )
    sizes = dataset.shard_folder.file_sizes()
    places = [(split, n) for split, entry in dataset.manifest.splits.items() for n in range(len(entry.shards))]
    wrong, hashes = [], {}
    shards_at_once = _SHARDS_AT_ONCE if full else workers
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(shards_at_once) as pool:
        check = _ShardVerifier(dataset, dataset.shard_folder, sizes, decoders, full, record_checksums)
        for (split, number), (said, sha256) in zip(places, pool.map(check.verify_shard, places), strict=True):
            wrong += said
            hashes[split, number] = sha256
            on_progress(len(hashes), len(places))
    if record_checksums and not wrong:
        _record_checksums(dataset, hashes)
    return wrong


@dataclass(frozen=True)
class _ShardVerifier:
    dataset: Dataset
    folder: Folder
    sizes: dict[str, int | None]
    decoders: ThreadPoolExecutor
    full: bool
    record_checksums: bool

    def verify_shard(self, which: tuple[str, int]) -> ShardFindings:
        split, number = which
        shard = self.dataset.manifest.splits[split].shards[number]
        where = self.folder.display_path(shard.file)
        try:
            wrong = self._check_size(shard, where)
            index, said = self._check_index(split, number, shard, where)
            # If not even the size is right, these are not the bytes that the index speaks of.
            found, sha256 = ([], None) if wrong else self._check_bytes(shard, where, index)
        except DataError as error:
            return [str(error)], None
        except OSError as error:
            return [f"{where} cannot be read ({error})"], None
        return [*wrong, *said, *found], sha256

    def _check_size(self, shard: Shard, where: str) -> list[str]:
        if shard.file not in self.sizes:
            return [f"{where} is missing, and {MANIFEST_NAME} lists it"]
        size = self.sizes[shard.file]
        size = self.folder.file_size(shard.file) if size is None else size
        return [f"{where} has {size} bytes and {MANIFEST_NAME} says {shard.bytes}"] if size != shard.bytes else []

    def _check_index(self, split: str, number: int, shard: Shard, where: str) -> tuple[ShardIndex | None, list[str]]:
        """The index of a shard, if it is one to rely on, and what is wrong with it."""
        try:
            index = self.dataset.shard_index(split, number)
        except DataError as error:
            return None, [str(error)]
        if index.compute_checksum() != index.checksum or index.compute_digest() != shard.index:
            return None, [f"{where}: its index is damaged, its checksum is not that of what it holds"]
        wrong = [index.note] if index.note else []
        if (index.shard, index.bytes) != (shard.file, shard.bytes):
            wrong.append(f"{where}: its index was made from {index.shard} of {index.bytes} bytes")
        if more := set(index.fields) - set(self.dataset.manifest.fields):
            wrong.append(f"{where}: {MANIFEST_NAME} does not know its members {', '.join(sorted(more))}")
        classes = len(self.dataset.classes or ())
        if len(outside := np.flatnonzero(index.labels >= classes)):
            first = int(outside[0])
            wrong.append(
                f"{where}: {len(outside)} labels are not among the {classes} classes of {MANIFEST_NAME}, the first is "
                f"{index.labels[first]}, of '{index.key(first)}'"
            )
        return index, wrong

    def _check_bytes(self, shard: Shard, where: str, index: ShardIndex | None) -> ShardFindings:
        """Hash a shard if it is asked for; in full, also walk its headers and decode its images."""
        if not self.full and (not self.record_checksums or shard.sha256):
            return [], None
        digest = hashlib.sha256()
        with self._open_hashed(shard, digest.update) as stream:
            sha256, wrong = digest.hexdigest(), []
            if shard.sha256 not in (None, sha256):
                wrong.append(f"{where} is damaged, its sha256 is {sha256} and {MANIFEST_NAME} says {shard.sha256}")
            if self.full and index is not None:
                headers = self._check_headers(stream, where, index, damaged=bool(wrong))
                wrong += [*headers, *self._check_images(stream, where, index)]
        return wrong, sha256

    @contextmanager
    def _open_hashed(self, shard: Shard, see: Callable[[bytes], None]) -> Iterator[IO[bytes]]:
        """A shard as an open file of this machine, all of whose bytes ``see`` was shown."""
        pieces = self.folder.iter_chunks(shard.file, shard.bytes)
        if not is_remote(self.dataset.folder):
            for piece in pieces:
                see(piece)
            with self.folder.open_file(shard.file) as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as stream:
            for piece in pieces:
                see(piece)
                stream.write(piece)
            stream.flush()
            yield stream

    def _check_headers(self, stream: IO[bytes], where: str, index: ShardIndex, *, damaged: bool) -> list[str]:
        """See that the tar holds what the index says, by the rules that the index was made by."""
        label_key, classes = index.rules["label_key"], index.rules["classes"] and self.dataset.classes
        rules = IndexRules(classes or None, str(label_key) if label_key else None, bool(index.rules["dotted_keys"]))
        try:
            fresh = scan_stream(stream, where, index.shard, rules)
        except DataError as error:
            return [str(error)]
        same = (fresh.fields, fresh.compute_digest()) == (index.fields, index.compute_digest())
        if damaged or (same and np.array_equal(fresh.offsets, index.offsets)):
            return []  # damaged bytes say nothing of the index
        return [
            f"{where}: its members or labels are not those that its index was made from: `foveal data index --again`"
        ]

    def _check_images(self, stream: IO[bytes], where: str, index: ShardIndex) -> Iterator[str]:
        """Decode every image of a shard, in parallel."""

        def decoded(rows: range) -> list[str]:
            return [said for row in rows if (said := _check_image(stream.fileno(), where, index, row))]

        parts = [
            range(start, min(start + _IMAGES_PER_JOB, len(index))) for start in range(0, len(index), _IMAGES_PER_JOB)
        ]
        for said in self.decoders.map(decoded, parts):
            yield from said


def _check_image(descriptor: int, where: str, index: ShardIndex, row: int) -> str:
    """What is wrong with the image of a sample, or ''."""
    offset, size = index.find_image(row)
    try:
        decode_image(os.pread(descriptor, size, offset), 3)
    except UndecodableError as error:
        return f"{where}: the image of '{index.key(row)}' does not decode ({error})"
    return ""


def _record_checksums(dataset: Dataset, hashes: dict[tuple[str, int], str | None]) -> None:
    """Write the sha256 that were computed into the manifest."""
    splits = {
        split: entry.model_copy(
            update={
                "shards": tuple(
                    replace(shard, sha256=shard.sha256 or hashes[split, number])
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
