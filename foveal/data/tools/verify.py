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
from foveal.data.format.manifest import NAME, Shard, write_manifest
from foveal.data.format.shard_index import Rules, ShardIndex
from foveal.data.image.decode import Undecodable, decode
from foveal.data.indexing.index import walk_stream
from foveal.data.storage.folder import Folder
from foveal.errors import DataError

_AT_ONCE = 32  # images that a thread decodes before it takes others
_SHARDS_AT_ONCE = 2  # one is fetched and hashed while the images of another are decoded

Found = tuple[list[str], str | None]  # what is wrong with a shard, and its sha256 where it was computed


def verify(
    dataset: Dataset,
    *,
    full: bool,
    workers: int,
    record: bool = False,
    done: Callable[[int, int], None] = lambda _shards, _all: None,
) -> list[str]:
    """What is wrong with a data set, one sentence each, in the order of its splits and shards; nothing if all is well.

    Fast: every shard is there with the size, and its index with the digest and count, that the manifest says. Full:
    also sha256, tar headers against index, and every image decoded, in ``workers`` threads; a shard behind a URL is
    fetched into the temporary folder for as long as it is looked at. record: write the sha256 that the manifest does
    not have into it, if nothing is wrong. done: hears how many of all shards are.
    Errors: DataError if the folder cannot be listed or the manifest not be written.
    """
    if record and is_remote(dataset.index_folder):
        raise DataError(f"{dataset.index_folder} is a URL, {NAME} can only be written into a folder: copy it first")
    sizes = dataset.place.sizes()
    places = [(split, n) for split, entry in dataset.manifest.splits.items() for n in range(len(entry.shards))]
    wrong, hashes = [], {}
    shards_at_once = _SHARDS_AT_ONCE if full else workers
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(shards_at_once) as pool:
        check = _Check(dataset, dataset.place, sizes, decoders, full, record)
        for (split, number), (said, sha256) in zip(places, pool.map(check.shard, places), strict=True):
            wrong += said
            hashes[split, number] = sha256
            done(len(hashes), len(places))
    if record and not wrong:
        _record(dataset, hashes)
    return wrong


@dataclass(frozen=True)
class _Check:
    dataset: Dataset
    place: Folder
    sizes: dict[str, int | None]
    decoders: ThreadPoolExecutor
    full: bool
    record: bool

    def shard(self, which: tuple[str, int]) -> Found:
        split, number = which
        shard = self.dataset.manifest.splits[split].shards[number]
        where = self.place.where(shard.file)
        try:
            wrong = self._size(shard, where)
            index, said = self._index(split, number, shard, where)
            # If not even the size is right, these are not the bytes that the index speaks of.
            found, sha256 = ([], None) if wrong else self._bytes(shard, where, index)
        except DataError as error:
            return [str(error)], None
        except OSError as error:
            return [f"{where} cannot be read ({error})"], None
        return [*wrong, *said, *found], sha256

    def _size(self, shard: Shard, where: str) -> list[str]:
        if shard.file not in self.sizes:
            return [f"{where} is missing, and {NAME} lists it"]
        size = self.sizes[shard.file]
        size = self.place.size(shard.file) if size is None else size
        return [f"{where} has {size} bytes and {NAME} says {shard.bytes}"] if size != shard.bytes else []

    def _index(self, split: str, number: int, shard: Shard, where: str) -> tuple[ShardIndex | None, list[str]]:
        """The index of a shard, if it is one to rely on, and what is wrong with it."""
        try:
            index = self.dataset.index(split, number)
        except DataError as error:
            return None, [str(error)]
        if index.sum() != index.checksum or index.digest() != shard.index:
            return None, [f"{where}: its index is damaged, its checksum is not that of what it holds"]
        wrong = [index.note] if index.note else []
        if (index.shard, index.bytes) != (shard.file, shard.bytes):
            wrong.append(f"{where}: its index was made from {index.shard} of {index.bytes} bytes")
        if more := set(index.fields) - set(self.dataset.manifest.fields):
            wrong.append(f"{where}: {NAME} does not know its members {', '.join(sorted(more))}")
        classes = len(self.dataset.classes or ())
        if len(outside := np.flatnonzero(index.labels >= classes)):
            first = int(outside[0])
            wrong.append(
                f"{where}: {len(outside)} labels are not among the {classes} classes of {NAME}, the first is "
                f"{index.labels[first]}, of '{index.key(first)}'"
            )
        return index, wrong

    def _bytes(self, shard: Shard, where: str, index: ShardIndex | None) -> Found:
        """Hash a shard if it is asked for; in full, also walk its headers and decode its images."""
        if not self.full and (not self.record or shard.sha256):
            return [], None
        digest = hashlib.sha256()
        with self._fetched(shard, digest.update) as stream:
            sha256, wrong = digest.hexdigest(), []
            if shard.sha256 not in (None, sha256):
                wrong.append(f"{where} is damaged, its sha256 is {sha256} and {NAME} says {shard.sha256}")
            if self.full and index is not None:
                headers = self._headers(stream, where, index, damaged=bool(wrong))
                wrong += [*headers, *self._images(stream, where, index)]
        return wrong, sha256

    @contextmanager
    def _fetched(self, shard: Shard, see: Callable[[bytes], None]) -> Iterator[IO[bytes]]:
        """A shard as an open file of this machine, all of whose bytes ``see`` was shown."""
        pieces = self.place.pieces(shard.file, shard.bytes)
        if not is_remote(self.dataset.folder):
            for piece in pieces:
                see(piece)
            with self.place.open(shard.file) as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as stream:
            for piece in pieces:
                see(piece)
                stream.write(piece)
            stream.flush()
            yield stream

    def _headers(self, stream: IO[bytes], where: str, index: ShardIndex, *, damaged: bool) -> list[str]:
        """See that the tar holds what the index says, by the rules that the index was made by."""
        label_key, classes = index.rules["label_key"], index.rules["classes"] and self.dataset.classes
        rules = Rules(classes or None, str(label_key) if label_key else None, bool(index.rules["dotted_keys"]))
        try:
            fresh = walk_stream(stream, where, index.shard, rules)
        except DataError as error:
            return [str(error)]
        same = (fresh.fields, fresh.digest()) == (index.fields, index.digest())
        if damaged or (same and np.array_equal(fresh.offsets, index.offsets)):
            return []  # damaged bytes say nothing of the index
        return [
            f"{where}: its members or labels are not those that its index was made from: `foveal data index --again`"
        ]

    def _images(self, stream: IO[bytes], where: str, index: ShardIndex) -> Iterator[str]:
        """Decode every image of a shard, in parallel."""

        def decoded(rows: range) -> list[str]:
            return [said for row in rows if (said := _decoded(stream.fileno(), where, index, row))]

        parts = [range(start, min(start + _AT_ONCE, len(index))) for start in range(0, len(index), _AT_ONCE)]
        for said in self.decoders.map(decoded, parts):
            yield from said


def _decoded(descriptor: int, where: str, index: ShardIndex, row: int) -> str:
    """What is wrong with the image of a sample, or ''."""
    offset, size = index.image(row)
    try:
        decode(os.pread(descriptor, size, offset), 3)
    except Undecodable as error:
        return f"{where}: the image of '{index.key(row)}' does not decode ({error})"
    return ""


def _record(dataset: Dataset, hashes: dict[tuple[str, int], str | None]) -> None:
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
        raise DataError(f"{folder / NAME} cannot be written ({error})") from None
