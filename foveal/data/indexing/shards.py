"""Indexing of the shards of a folder in parallel; an index that is still of its shard is reused."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, make_index, mmap_index, write_index
from foveal.data.indexing.numeric_labels import NAMES, POSITIONS, LabelMismatchError, decide, is_open
from foveal.data.indexing.summary import ShardSummary, summarize_index
from foveal.data.indexing.tar import scan_tar
from foveal.data.storage.folder import Folder
from foveal.errors import DataError


def _no_counts() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass
class IndexedShards:
    """Shards that were indexed or whose index was reused.

    summaries: by file. class_counts: samples per class, int64 [classes], by the ``numeric_labels`` of the index. changed:
    files whose index was of another version. num_unchecked: number of reused indices of shards without a known version.
    """

    summaries: dict[str, ShardSummary] = field(default_factory=dict)
    class_counts: defaultdict[str | None, np.ndarray] = field(default_factory=lambda: defaultdict(_no_counts))
    changed: set[str] = field(default_factory=set)
    num_unchecked: int = 0


class _IndexedShard(NamedTuple):
    summary: ShardSummary
    class_counts: np.ndarray
    numeric_labels: str | None
    changed: bool
    unchecked: bool


def index_shards(
    source: Folder,
    rules: IndexRules,
    output_folder: Path,
    rebuild: bool,
    files: Sequence[str],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> tuple[IndexRules, IndexedShards]:
    """Index the shards that have no valid index; return the rules, with the ``numeric_labels`` that fit all shards.

    Where these are open, each shard is read as names, or else as positions. No order of shards changes the result.
    """
    choices = [rules]
    if rules.numeric_labels is None and is_open(rules.classes):
        choices = [replace(rules, numeric_labels=choice) for choice in (NAMES, POSITIONS)]
    indexed = IndexedShards()
    with ThreadPoolExecutor(workers) as pool:
        # After an error `map` cancels the shards that have not started; indices written before stay.
        work = functools.partial(_index_or_reuse, source, choices, output_folder, rebuild)
        for file, shard in zip(files, pool.map(work, files), strict=True):
            indexed.summaries[file] = shard.summary
            counts = indexed.class_counts[shard.numeric_labels]
            indexed.class_counts[shard.numeric_labels] = _add_counts(counts, shard.class_counts)
            indexed.changed |= {file} if shard.changed else set()
            indexed.num_unchecked += shard.unchecked
            on_progress(len(indexed.summaries), len(files))
    if len(choices) == 1:
        return rules, indexed
    meaning = decide(
        source.display_path(),
        rules.classes or (),
        {choice: indexed.class_counts[choice] for choice in (NAMES, POSITIONS)},
    )
    decided = replace(rules, numeric_labels=meaning)
    if any(counts.any() for choice, counts in indexed.class_counts.items() if choice != meaning):
        changed = indexed.changed
        _, indexed = index_shards(source, decided, output_folder, False, files, workers, on_progress)
        indexed.changed |= changed
    return decided, indexed


def scan_shard(folder: Folder, shard_file: str, rules: IndexRules) -> ShardIndex:
    """Return the index of one shard of ``folder``. Raises: as ``index_folder``."""
    try:
        with folder.open_file(shard_file) as stream:
            return scan_shard_stream(stream, folder.display_path(shard_file), shard_file, rules)
    except OSError as error:
        raise DataError(f"{folder.display_path(shard_file)} cannot be read ({error})") from None


def scan_shard_stream(stream: IO[bytes], location: str, shard_file: str, rules: IndexRules) -> ShardIndex:
    """Return the index of an open shard. Raises: OSError if a read fails, DataError as ``scan_tar``."""
    size = stream.seek(0, 2)
    stream.seek(0)
    samples, note, left_out = scan_tar(stream, size, location, rules)
    fields = tuple(dict.fromkeys(name for sample in samples for name in sample.offset_size_by_field))
    return make_index(shard_file, size, fields, samples, rules, note, left_out)


def is_older(source: Folder, file: str, reference: Path) -> bool:
    """Whether a shard was modified before ``reference``; equal times are not older, an unknown time is."""
    modified = source.modified_time(file)
    return modified is None or modified < reference.stat().st_mtime


def _index_or_reuse(
    source: Folder, choices: Sequence[IndexRules], output_folder: Path, rebuild: bool, file: str
) -> _IndexedShard:
    """Index one shard by the first rules that fit its labels, unless a valid index exists."""
    index_file = output_folder / f"{file}{INDEX_SUFFIX}"
    version = _read_version(source, file)
    old = _load_index(index_file)
    changed = old is not None and "" not in (old.shard_version, version) and old.shard_version != version
    index = None
    if (
        old is not None
        and not rebuild
        and any(_is_valid(source, rules, old, index_file, file, version) for rules in choices)
    ):
        index = old
    reused = index is not None
    if index is None:
        index = replace(_scan_by_first_fit(source, file, choices), shard_version=version)
        if len(index):
            write_index(index, index_file)
    counts = np.bincount(index.labels[index.labels >= 0])
    numeric_labels = index.rules.get("numeric_labels")
    return _IndexedShard(
        summarize_index(index, source.display_path(file)),
        counts,
        None if numeric_labels is None else str(numeric_labels),
        changed,
        unchecked=reused and not version,
    )


def _scan_by_first_fit(source: Folder, file: str, choices: Sequence[IndexRules]) -> ShardIndex:
    """Scan a shard by the first rules that fit its labels. Raises: as ``index_folder``, of the first rules."""
    first_error: LabelMismatchError | None = None
    for rules in choices:
        try:
            return scan_shard(source, file, rules)
        except LabelMismatchError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _read_version(source: Folder, file: str) -> str:
    """Return what changes with a shard's bytes: its modification time, or else its ETag; '' if neither is known."""
    modified = source.modified_time(file)
    if modified is not None:
        return f"modified {modified}"
    etag = source.etag(file)
    return "" if etag is None else f"ETag {etag}"


def _load_index(index_file: Path) -> ShardIndex | None:
    try:
        return mmap_index(index_file)[0]
    except DataError:
        return None


def _is_valid(source: Folder, rules: IndexRules, index: ShardIndex, index_file: Path, file: str, version: str) -> bool:
    """Whether an existing index is undamaged, has the same rules and is of this version of the shard.

    An index of 0.1, or of a shard whose version is not known, is to be newer than the shard, as far as that is known.
    """
    if (index.shard, index.bytes, index.rules) != (file, source.file_size(file), rules.to_metadata()):
        return False
    if index.shard_version and version:
        is_current = index.shard_version == version
    else:
        is_current = is_older(source, file, index_file)
    return is_current and index.compute_checksum() == index.checksum


def _add_counts(counts: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Return the sum of two arrays, the shorter one filled with zeros."""
    length = max(len(counts), len(added))
    return np.pad(counts, (0, length - len(counts))) + np.pad(added, (0, length - len(added)))
