"""Indices for shards that others wrote, in parallel; what was indexed before is not walked again."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from foveal.data.config import is_remote
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, Shard, Split, read_manifest, write_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, ShardIndex, make_index, mmap_index, write_index
from foveal.data.indexing.tar import scan_tar
from foveal.data.storage.folder import Folder, resolve_folder
from foveal.errors import DataError
from foveal.redact import redact_urls

_SPLIT = re.compile(r"(.*?)[-_.]?(\d*)\.tar")  # train-000012.tar: split 'train', number 12
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ShardSummary:
    """What the manifest takes from one index; the index itself would fill the memory 200,000 times."""

    shard: Shard | None  # nothing if it has no samples
    fields: tuple[str, ...]
    highest: int
    unlabelled: int
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
    on_progress: Callable[[int, int], None] = lambda _shards, _all: None,
) -> Manifest:
    """Index every shard of a folder or URL, grouped into splits by name, and write manifest.json last.

    index: where to write, default beside the shards; classes: their names, by label (default: the labels as digits);
    label_key, dotted_keys: as in ``Rules``. Shards whose index is newer and was made in the same way keep it, unless
    ``again``. tell: hears of shards that are cut short or hold nothing, and of samples without a label; done: hears
    how many of all shards are. Of a manifest that is there already, name, pixel statistics and class names stay
    (``tell`` hears of it if the samples are others), and the sha256 of a shard if it was not written since (``again``
    forgets it).
    Raises: DataError in one sentence for shards that are missing, compressed, empty, damaged, or hold a key twice.
    """
    if output_folder is None and is_remote(folder):
        raise DataError(f"{redact_urls(folder)} is a URL: say with --index FOLDER where its index is to be written")
    output_folder = Path(folder) if output_folder is None else output_folder
    rules = IndexRules(tuple(classes) if classes else None, label_key, dotted_keys)
    place = resolve_folder(folder)
    groups = _group_by_split(place)
    files = [file for group in groups.values() for file in group]
    try:
        output_folder.mkdir(parents=True, exist_ok=True)
        found = {}
        with ThreadPoolExecutor(workers) as pool:
            # An error ends `map`, which takes back what has not begun; what was indexed until then stays.
            work = functools.partial(_index_or_reuse, place, rules, output_folder, rebuild)
            for file, walked in zip(files, pool.map(work, files), strict=True):
                found[file] = walked
                on_progress(len(found), len(files))
        splits = _summarize_splits(
            {split: [found[file] for file in group] for split, group in groups.items()}, on_warning
        )
        if not splits:
            raise DataError(
                f"{place.display_path()}: none of its {len(files)} shards holds a whole sample: write them again"
            )
        if label_key is not None and all(walked.highest < 0 for walked in found.values()):
            raise DataError(
                f"{place.display_path()}: no sample has a label '{label_key}' in its .json: correct --label-key"
            )
        manifest = _build_manifest(place, output_folder, splits, found.values(), rules, name, rebuild, on_warning)
        write_manifest(manifest, output_folder)
    except OSError as error:
        raise DataError(
            f"{output_folder}: an index cannot be written here ({error}); say with --index FOLDER where it can"
        ) from None
    return manifest


def index_shard(folder: str, shard_file: str, classes: Sequence[str] | None = None) -> ShardIndex:
    """The index of one shard. ``classes`` turns names in `.cls` members into labels and bounds the numbers.

    A shard without samples has an index of length 0. Raises: as ``index_folder``.
    """
    return scan_shard(resolve_folder(folder), shard_file, IndexRules(tuple(classes) if classes else None))


def scan_shard(folder: Folder, shard_file: str, rules: IndexRules) -> ShardIndex:
    """The index of one shard of a folder, by any rules. Raises: as ``index_folder``."""
    try:
        with folder.open_file(shard_file) as stream:
            return scan_stream(stream, folder.display_path(shard_file), shard_file, rules)
    except OSError as error:
        raise DataError(f"{folder.display_path(shard_file)} cannot be read ({error})") from None


def scan_stream(stream: IO[bytes], location: str, shard_file: str, rules: IndexRules) -> ShardIndex:
    """The index of the shard ``file`` that is open in ``stream``. Raises: OSError, DataError with ``where``."""
    size = stream.seek(0, 2)
    stream.seek(0)
    samples, note = scan_tar(stream, size, location, rules)
    fields = tuple(dict.fromkeys(name for sample in samples for name in sample.members))
    return make_index(shard_file, size, fields, samples, rules, note)


def make_manifest_split(indices: Sequence[ShardIndex], checksums: Sequence[str] | None = None) -> Split:
    """The manifest's entry of a split whose shards have these indices."""
    hashes = checksums or [None] * len(indices)
    shards = tuple(_manifest_shard(index, known) for index, known in zip(indices, hashes, strict=True))
    return Split(samples=sum(len(index) for index in indices), shards=shards)


def collect_fields(indices: Iterable[ShardIndex | _ShardSummary]) -> tuple[str, ...]:
    """The kinds of members in any of the shards, as they first appear."""
    return tuple(dict.fromkeys(name for index in indices for name in index.fields))


def _manifest_shard(index: ShardIndex, sha256: str | None = None) -> Shard:
    return Shard(file=index.shard, samples=len(index), bytes=index.bytes, sha256=sha256, index=index.compute_digest())


def _group_by_split(place: Folder) -> dict[str, list[str]]:
    """Shards by split, in the order of their numbers.

    Raises: DataError if there are none or if one is compressed and not unpacked beside.
    """
    names = sorted(place.file_sizes())
    for name in names:
        compressed = re.fullmatch(r"(.*\.tar)\.\w+|(.*)\.tgz", name)
        plain = compressed and (compressed[1] or f"{compressed[2]}.tar")
        if plain and not name.endswith(INDEX_SUFFIX) and plain not in names:
            raise DataError(
                f"{place.display_path(name)} is compressed, which has no random access: unpack it to {plain} and index again"
            )
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if found := _SPLIT.fullmatch(name):
            groups.setdefault(found[1] or "train", []).append((int(found[2] or 0), name))
    if not groups:
        raise DataError(f"{place.display_path()}: no shards (*.tar) here")
    return {split: [name for _, name in sorted(found)] for split, found in groups.items()}


def _index_or_reuse(place: Folder, rules: IndexRules, folder: Path, again: bool, file: str) -> _ShardSummary:
    """Index one shard, unless its index is there."""
    target = folder / f"{file}{INDEX_SUFFIX}"
    index = None if again else _load_valid_index(place, rules, target, file)
    if index is None:
        index = scan_shard(place, file, rules)
        if len(index):
            write_index(index, target)
    if not len(index):
        return _ShardSummary(
            None, (), -1, 0, index.note or f"{place.display_path(file)} holds no samples: it is left out"
        )
    unlabelled = int((index.labels < 0).sum())
    return _ShardSummary(_manifest_shard(index), index.fields, int(index.labels.max()), unlabelled, index.note)


def _load_valid_index(place: Folder, rules: IndexRules, target: Path, file: str) -> ShardIndex | None:
    """The index that is there, if it is whole, was made by the same rules, and the shard has not changed since."""
    try:
        index, _ = mmap_index(target)
    except DataError:
        return None
    same = (index.shard, index.bytes, index.rules) == (file, place.file_size(file), rules.to_metadata())
    return index if same and _is_older(place, file, target) and index.compute_checksum() == index.checksum else None


def _is_older(place: Folder, file: str, than: Path) -> bool:
    """Whether a shard was last written before a file of ours, as far as its folder says. A tie is no proof."""
    modified = place.modified_time(file)
    return modified is None or modified < than.stat().st_mtime


def _summarize_splits(groups: dict[str, list[_ShardSummary]], tell: Callable[[str], None]) -> dict[str, Split]:
    """Say what was found beside sound samples; the splits that have some."""
    splits = {}
    for split, group in groups.items():
        for walked in group:
            if walked.note:
                tell(walked.note)
        shards = tuple(walked.shard for walked in group if walked.shard)
        samples = sum(shard.samples for shard in shards)
        if unlabelled := sum(walked.unlabelled for walked in group):
            tell(f"{split}: {unlabelled:,} of {samples:,} samples have no class")
        if shards:
            splits[split] = Split(samples=samples, shards=shards)
    return splits


def _build_manifest(
    place: Folder,
    index: Path,
    splits: dict[str, Split],
    walked: Iterable[_ShardSummary],
    rules: IndexRules,
    name: str | None,
    again: bool,
    tell: Callable[[str], None],
) -> Manifest:
    walked = list(walked)
    highest = max(one.highest for one in walked)
    fresh = Manifest(
        name=name or place.display_path().rstrip("/").rsplit("/", 1)[-1],
        fields=collect_fields(walked),
        classes=rules.classes or tuple(str(label) for label in range(highest + 1)) or None,
        splits=splits,
    )
    try:
        before = read_manifest(index)
    except (OSError, DataError):
        return fresh
    if not again:
        fresh = fresh.model_copy(update={"splits": _keep_checksums(place, index / MANIFEST_NAME, fresh.splits, before)})
    kept: dict[str, object] = {"name": name or before.name, "mean": before.mean, "std": before.std}
    if not rules.classes and before.classes is not None and len(before.classes) > highest:
        kept["classes"] = before.classes
    if _shard_digests(before) != _shard_digests(fresh):
        tell(
            f"{index / MANIFEST_NAME} was of other samples; its name, class names, mean and std were kept: remove it first if they "
            f"no longer hold"
        )
    return fresh.model_copy(update=kept)


def _keep_checksums(place: Folder, file: Path, splits: dict[str, Split], before: Manifest) -> dict[str, Split]:
    """The splits with the sha256 that the manifest in ``file`` knew of shards that were not written since."""
    known = {(shard.file, shard.bytes): shard.sha256 for split in before.splits.values() for shard in split.shards}

    def sha256(shard: Shard) -> str | None:
        found = known.get((shard.file, shard.bytes))
        return found if found and _is_older(place, shard.file, file) else None

    return {
        name: split.model_copy(update={"shards": tuple(replace(shard, sha256=sha256(shard)) for shard in split.shards)})
        for name, split in splits.items()
    }


def _shard_digests(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [shard.index for shard in split.shards] for name, split in manifest.splits.items()}
