"""Build indices of existing shards, in parallel; valid indices are reused."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from foveal.data.config import is_url
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, Shard, Split, read_manifest, write_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, make_index, mmap_index, write_index
from foveal.data.indexing.tar import scan_tar
from foveal.data.storage.folder import Folder, open_folder_or_url
from foveal.errors import DataError
from foveal.redact import redact_url_secrets

_SPLIT = re.compile(r"(.*?)[-_.]?(\d*)\.tar")  # train-000012.tar: split 'train', number 12
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ShardSummary:
    """Part of an index that the manifest needs; 200,000 complete indices would not fit into memory."""

    shard: Shard | None  # None: the shard has no samples
    fields: tuple[str, ...]
    max_label: int
    num_unlabelled: int
    note: str


def index_folder(
    folder: str,
    output_folder: Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    label_key: str | None = None,
    dotted_keys: bool = False,
    name: str | None = None,
    workers: int = 8,
    rebuild: bool = False,
    on_warning: Callable[[str], None] = _log.warning,
    on_progress: Callable[[int, int], None] = lambda _num_indexed, _num_shards: None,
) -> Manifest:
    """Index every shard of a folder or URL, group shards into splits by name, and write manifest.json last.

    output_folder: folder of indices and manifest (None: ``folder``). classes: class names, by label (None: the labels
    as digits). label_key, dotted_keys: as in ``IndexRules``. on_warning: called for truncated or empty shards, samples
    without a label, and an existing manifest of other samples. on_progress: called with the numbers of indexed shards
    and of all shards. An index that is newer than its shard and was built with the same rules is reused, unless
    ``rebuild``.
    An existing manifest's name, class names and pixel statistics are kept, as is the sha256 of a shard that was not
    modified since, unless ``rebuild``.
    Raises: DataError if shards are missing, compressed, empty, damaged or contain a key twice.
    """
    if output_folder is None and is_url(folder):
        raise DataError(
            f"{redact_url_secrets(folder)} is a URL: say with --index FOLDER where its index is to be written"
        )
    output_folder = Path(folder) if output_folder is None else output_folder
    rules = IndexRules(tuple(classes) if classes else None, label_key, dotted_keys)
    source = open_folder_or_url(folder)
    groups = _group_by_split(source)
    files = [file for group in groups.values() for file in group]
    try:
        output_folder.mkdir(parents=True, exist_ok=True)
        summaries: dict[str, _ShardSummary] = {}
        with ThreadPoolExecutor(workers) as pool:
            # After an error `map` cancels the shards that have not started; indices written before stay.
            work = functools.partial(_index_or_reuse, source, rules, output_folder, rebuild)
            for file, summary in zip(files, pool.map(work, files), strict=True):
                summaries[file] = summary
                on_progress(len(summaries), len(files))
        splits = _summarize_splits(
            {split: [summaries[file] for file in group] for split, group in groups.items()}, on_warning
        )
        if not splits:
            raise DataError(
                f"{source.display_path()}: none of its {len(files)} shards holds a whole sample: write them again"
            )
        if label_key is not None and all(summary.max_label < 0 for summary in summaries.values()):
            raise DataError(
                f"{source.display_path()}: no sample has a label '{label_key}' in its .json: correct --label-key"
            )
        manifest = _build_manifest(source, output_folder, splits, summaries.values(), rules, name, rebuild, on_warning)
        write_manifest(manifest, output_folder)
    except OSError as error:
        raise DataError(
            f"{output_folder}: an index cannot be written here ({error}); say with --index FOLDER where it can"
        ) from None
    return manifest


def build_shard_index(folder: str, shard_file: str, classes: Sequence[str] | None = None) -> ShardIndex:
    """Return the index of one shard, of length 0 if the shard has no samples; ``classes`` as in ``IndexRules``.

    Raises: as ``index_folder``.
    """
    return scan_shard(open_folder_or_url(folder), shard_file, IndexRules(tuple(classes) if classes else None))


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
    samples, note = scan_tar(stream, size, location, rules)
    fields = tuple(dict.fromkeys(name for sample in samples for name in sample.offset_size_by_field))
    return make_index(shard_file, size, fields, samples, rules, note)


def make_manifest_split(indices: Sequence[ShardIndex], checksums: Sequence[str] | None = None) -> Split:
    """Return the manifest's entry of a split from its shards' indices and, if known, their sha256."""
    known_checksums: Sequence[str | None] = checksums or [None] * len(indices)
    shards = tuple(_manifest_shard(index, checksum) for index, checksum in zip(indices, known_checksums, strict=True))
    return Split(samples=sum(len(index) for index in indices), shards=shards)


def collect_fields(indices: Iterable[ShardIndex | _ShardSummary]) -> tuple[str, ...]:
    """Return the fields of all shards, in order of first appearance."""
    return tuple(dict.fromkeys(name for index in indices for name in index.fields))


def _manifest_shard(index: ShardIndex, sha256: str | None = None) -> Shard:
    return Shard(
        file=index.shard, samples=len(index), bytes=index.bytes, sha256=sha256, index=index.compute_samples_digest()
    )


def _group_by_split(source: Folder) -> dict[str, list[str]]:
    """Return shard names by split, ordered by shard number.

    Raises: DataError if there are no shards, or if a compressed shard has no unpacked copy in the folder.
    """
    names = sorted(source.file_sizes())
    for name in names:
        compressed = re.fullmatch(r"(.*\.tar)\.\w+|(.*)\.tgz", name)
        plain = compressed and (compressed[1] or f"{compressed[2]}.tar")
        if plain and not name.endswith(INDEX_SUFFIX) and plain not in names:
            raise DataError(
                f"{source.display_path(name)} is compressed, which has no random access: unpack it to {plain} and "
                f"index again"
            )
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := _SPLIT.fullmatch(name):
            groups.setdefault(match[1] or "train", []).append((int(match[2] or 0), name))
    if not groups:
        raise DataError(f"{source.display_path()}: no shards (*.tar) here")
    return {split: [name for _, name in sorted(numbered)] for split, numbered in groups.items()}


def _index_or_reuse(source: Folder, rules: IndexRules, output_folder: Path, rebuild: bool, file: str) -> _ShardSummary:
    """Index one shard, unless a valid index exists."""
    index_file = output_folder / f"{file}{INDEX_SUFFIX}"
    index = None if rebuild else _load_valid_index(source, rules, index_file, file)
    if index is None:
        index = scan_shard(source, file, rules)
        if len(index):
            write_index(index, index_file)
    if not len(index):
        note = index.note or f"{source.display_path(file)} holds no samples: it is left out"
        return _ShardSummary(None, (), -1, 0, note)
    num_unlabelled = int((index.labels < 0).sum())
    return _ShardSummary(_manifest_shard(index), index.fields, int(index.labels.max()), num_unlabelled, index.note)


def _load_valid_index(source: Folder, rules: IndexRules, index_file: Path, file: str) -> ShardIndex | None:
    """Return the existing index if it is undamaged, has the same rules and is newer than the shard."""
    try:
        index, _ = mmap_index(index_file)
    except DataError:
        return None
    is_same = (index.shard, index.bytes, index.rules) == (file, source.file_size(file), rules.to_metadata())
    if is_same and _is_older(source, file, index_file) and index.compute_checksum() == index.checksum:
        return index
    return None


def _is_older(source: Folder, file: str, reference: Path) -> bool:
    """Whether a shard was modified before ``reference``; equal times are not older, an unknown time is."""
    modified = source.modified_time(file)
    return modified is None or modified < reference.stat().st_mtime


def _summarize_splits(groups: dict[str, list[_ShardSummary]], on_warning: Callable[[str], None]) -> dict[str, Split]:
    """Return the splits that have samples; warn of notes and of samples without a class."""
    splits = {}
    for split, group in groups.items():
        for summary in group:
            if summary.note:
                on_warning(summary.note)
        shards = tuple(summary.shard for summary in group if summary.shard)
        samples = sum(shard.samples for shard in shards)
        if num_unlabelled := sum(summary.num_unlabelled for summary in group):
            on_warning(f"{split}: {num_unlabelled:,} of {samples:,} samples have no class")
        if shards:
            splits[split] = Split(samples=samples, shards=shards)
    return splits


def _build_manifest(
    source: Folder,
    output_folder: Path,
    splits: dict[str, Split],
    summaries: Iterable[_ShardSummary],
    rules: IndexRules,
    name: str | None,
    rebuild: bool,
    on_warning: Callable[[str], None],
) -> Manifest:
    """Return the new manifest, with what ``index_folder`` keeps of an existing manifest."""
    summaries = list(summaries)
    max_label = max(summary.max_label for summary in summaries)
    manifest = Manifest(
        name=name or source.display_path().rstrip("/").rsplit("/", 1)[-1],
        fields=collect_fields(summaries),
        classes=rules.classes or tuple(str(label) for label in range(max_label + 1)) or None,
        splits=splits,
    )
    manifest_file = output_folder / MANIFEST_NAME
    try:
        previous = read_manifest(output_folder)
    except (OSError, DataError):
        return manifest
    if not rebuild:
        checked_splits = _restore_checksums(source, manifest_file, manifest.splits, previous)
        manifest = manifest.model_copy(update={"splits": checked_splits})
    kept_values: dict[str, object] = {"name": name or previous.name, "mean": previous.mean, "std": previous.std}
    if not rules.classes and previous.classes is not None and len(previous.classes) > max_label:
        kept_values["classes"] = previous.classes
    if _shard_digests(previous) != _shard_digests(manifest):
        on_warning(
            f"{manifest_file} was of other samples; its name, class names, mean and std were kept: remove it first if "
            f"they no longer hold"
        )
    return manifest.model_copy(update=kept_values)


def _restore_checksums(
    source: Folder, manifest_file: Path, splits: dict[str, Split], previous: Manifest
) -> dict[str, Split]:
    """Return the splits with the previous manifest's sha256 of shards that are older than that manifest."""
    checksums = {
        (shard.file, shard.bytes): shard.sha256 for split in previous.splits.values() for shard in split.shards
    }

    def with_checksum(shard: Shard) -> Shard:
        checksum = checksums.get((shard.file, shard.bytes))
        is_valid = checksum and _is_older(source, shard.file, manifest_file)
        return replace(shard, sha256=checksum if is_valid else None)

    return {
        name: split.model_copy(update={"shards": tuple(with_checksum(shard) for shard in split.shards)})
        for name, split in splits.items()
    }


def _shard_digests(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [shard.index for shard in split.shards] for name, split in manifest.splits.items()}
