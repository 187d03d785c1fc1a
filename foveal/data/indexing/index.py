"""Build indices of existing shards, in parallel; valid indices are reused."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from foveal.data.config import is_url
from foveal.data.format.class_counts import describe_empty_classes
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, Shard, Split, read_manifest, write_manifest
from foveal.data.format.shard_index import IndexRules, ShardIndex
from foveal.data.indexing.labels import check_class_names
from foveal.data.indexing.numeric_labels import resolve_rules
from foveal.data.indexing.shard_names import group_shards_by_split
from foveal.data.indexing.shards import IndexedShards, index_shards, is_older, scan_shard
from foveal.data.indexing.summary import (
    LEFT_OUT_SUFFIX,
    ShardSummary,
    check_images,
    collect_fields,
    make_manifest_shard,
    summarize_splits,
    with_checksums,
)
from foveal.data.storage.folder import Folder, open_folder_or_url
from foveal.errors import DataError
from foveal.redact import redact_url_secrets

_log = logging.getLogger(__name__)


def index_folder(
    folder: str,
    output_folder: Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    label_key: str | None = None,
    dotted_keys: bool = False,
    image_field: str | None = None,
    numeric_labels: str | None = None,
    name: str | None = None,
    bit_depth: int | None = None,
    workers: int = 8,
    rebuild: bool = False,
    on_warning: Callable[[str], None] = _log.warning,
    on_progress: Callable[[int, int], None] = lambda _num_indexed, _num_shards: None,
) -> Manifest:
    """Index every shard of a folder or URL, group shards into splits by name, and write manifest.json last.

    output_folder: folder of indices and manifest (None: ``folder``). classes: class names, by label (None: the labels
    as digits). label_key, dotted_keys, image_field, numeric_labels: as in ``IndexRules``; where ``numeric_labels`` is
    open it is that of the existing index, or what fits all labels. bit_depth: as in ``Manifest``. on_warning: called for
    truncated or empty shards, samples without an image or a label, classes without samples, several images in a sample,
    names that state more shards, shards that may have changed, and an existing manifest of other samples. on_progress:
    called with the numbers of indexed shards and of all shards. An index of the shard's modification time or ETag (of
    0.1: one that is newer than its shard) that was built with the same rules is reused, unless ``rebuild``. An existing
    manifest's name, class names, bit depth and pixel statistics are kept, as is the sha256 of a shard that was not
    modified since, unless ``rebuild``. Pixel statistics are of a bit depth: another one drops them.
    Raises: DataError if there are no shards, one is compressed, empty, damaged or contains a key twice, no sample has an
    image, or which member is the image, or what a number as label means, is open.
    """
    check_class_names(classes or ())
    if output_folder is None and is_url(folder):
        raise DataError(
            f"{redact_url_secrets(folder)} is a URL: say with --index FOLDER where its index is to be written"
        )
    output_folder = Path(folder) if output_folder is None else output_folder
    image_field = image_field.lower().lstrip(".") if image_field else None
    rules = IndexRules(tuple(classes) if classes else None, label_key, dotted_keys, image_field)
    rules = resolve_rules(rules, numeric_labels, output_folder)
    source = open_folder_or_url(folder)
    groups = group_shards_by_split(source, on_warning)
    files = [file for group in groups.values() for file in group]
    try:
        output_folder.mkdir(parents=True, exist_ok=True)
        rules, indexed = index_shards(source, rules, output_folder, rebuild, files, workers, on_progress)
        summaries = indexed.summaries
        splits = summarize_splits(
            {split: [summaries[file] for file in group] for split, group in groups.items()}, on_warning
        )
        _check_summaries(source, rules, summaries, splits, on_warning)
        manifest = _build_manifest(source, output_folder, splits, indexed, rules, name, bit_depth, rebuild, on_warning)
        _warn_of_doubts(rules, manifest, indexed, on_warning)
        write_manifest(manifest, output_folder)
    except OSError as error:
        raise DataError(
            f"{output_folder}: an index cannot be written here ({error}); say with --index FOLDER where it can"
        ) from None
    return manifest


def _warn_of_doubts(
    rules: IndexRules, manifest: Manifest, indexed: IndexedShards, on_warning: Callable[[str], None]
) -> None:
    """Warn of classes without samples, and of reused indices whose shards may have changed."""
    names, counts = manifest.classes or (), indexed.class_counts[rules.numeric_labels]
    if sentence := describe_empty_classes(np.pad(counts, (0, len(names) - len(counts))), names):
        surplus = rules.classes is not None and len(counts) < len(names)
        hint = "; names that contain commas are given with --classes-file" if surplus else ""
        on_warning(f"{sentence}{hint}")
    if indexed.num_unchecked:
        on_warning(
            f"{indexed.num_unchecked:,} shards have no modification time and no ETag: their indices were reused, because "
            f"their sizes are the same; --again scans them"
        )


def build_shard_index(folder: str, shard_file: str, classes: Sequence[str] | None = None) -> ShardIndex:
    """Return the index of one shard, of length 0 if the shard has no samples; ``classes`` as in ``IndexRules``.

    Raises: as ``index_folder``.
    """
    return scan_shard(open_folder_or_url(folder), shard_file, IndexRules(tuple(classes) if classes else None))


def make_manifest_split(indices: Sequence[ShardIndex], checksums: Sequence[str] | None = None) -> Split:
    """Return the manifest's entry of a split from its shards' indices and, if known, their sha256."""
    known_checksums: Sequence[str | None] = checksums or [None] * len(indices)
    shards = tuple(
        make_manifest_shard(index, checksum) for index, checksum in zip(indices, known_checksums, strict=True)
    )
    return Split(samples=sum(len(index) for index in indices), shards=shards)


def _check_summaries(
    source: Folder,
    rules: IndexRules,
    summaries: dict[str, ShardSummary],
    splits: dict[str, Split],
    on_warning: Callable[[str], None],
) -> None:
    """Raise DataError if no shard has samples, an image or a label; warn which member is the image where it is open."""
    if not splits:
        for summary in summaries.values():
            if summary.left_out.samples:
                named = "if one of them is the image, name it with --image-field; otherwise write the shards again"
                problem = summary.note.removesuffix(LEFT_OUT_SUFFIX)
                raise DataError(f"{problem}: {named if rules.image_field is None else 'correct --image-field'}")
        raise DataError(
            f"{source.display_path()}: none of its {len(summaries)} shards holds a whole sample: write them again, with "
            f"members KEY.jpg and KEY.cls"
        )
    fields = collect_fields(summaries.values())
    if rules.label_key is not None and "json" not in fields:
        raise DataError(
            f"{source.display_path()}: no sample has a member .json, which --label-key reads, the members are: "
            f"{', '.join(fields)}: write the shards again with the class in KEY.json, or omit --label-key"
        )
    if rules.label_key is not None and all(summary.max_label < 0 for summary in summaries.values()):
        raise DataError(
            f"{source.display_path()}: no sample has a label '{rules.label_key}' in its .json: correct --label-key, or omit it "
            f"if no sample has a class"
        )
    check_images(source.display_path(), summaries.values(), rules.image_field, on_warning)


def _build_manifest(
    source: Folder,
    output_folder: Path,
    splits: dict[str, Split],
    indexed: IndexedShards,
    rules: IndexRules,
    name: str | None,
    bit_depth: int | None,
    rebuild: bool,
    on_warning: Callable[[str], None],
) -> Manifest:
    """Return the new manifest, with what ``index_folder`` keeps of an existing manifest."""
    summaries = indexed.summaries.values()
    max_label = max(summary.max_label for summary in summaries)
    manifest = Manifest(
        name=name or source.display_path().rstrip("/").rsplit("/", 1)[-1],
        fields=collect_fields(summaries),
        classes=rules.classes or tuple(str(label) for label in range(max_label + 1)) or None,
        bit_depth=bit_depth,
        splits=splits,
    )
    manifest_file = output_folder / MANIFEST_NAME
    try:
        previous = read_manifest(output_folder)
    except (OSError, DataError):
        return manifest
    if not rebuild:
        checked_splits = _restore_checksums(source, manifest_file, manifest.splits, previous, indexed.changed)
        manifest = manifest.model_copy(update={"splits": checked_splits})
    kept_values: dict[str, object] = {"name": name or previous.name}
    if bit_depth in (None, previous.bit_depth):
        kept_values |= {name: getattr(previous, name) for name in ("mean", "std", "bit_depth")}
    elif previous.mean is not None:
        on_warning(
            f"{manifest_file} had mean and std of another bit depth; they were removed: set data.mean and data.std"
        )
    if not rules.classes and previous.classes is not None and len(previous.classes) > max_label:
        kept_values["classes"] = previous.classes
    if _shard_digests(previous) != _shard_digests(manifest):
        on_warning(
            f"{manifest_file} was of other samples; its name, class names, mean and std were kept: remove it first if "
            f"they no longer hold"
        )
    return manifest.model_copy(update=kept_values)


def _restore_checksums(
    source: Folder, manifest_file: Path, splits: dict[str, Split], previous: Manifest, changed: set[str]
) -> dict[str, Split]:
    """Return the splits with the previous manifest's sha256 of shards that are older than it and not ``changed``."""
    checksums = {
        (shard.file, shard.bytes): shard.sha256 for split in previous.splits.values() for shard in split.shards
    }

    def find_checksum(shard: Shard) -> str | None:
        checksum = checksums.get((shard.file, shard.bytes))
        return (
            checksum if checksum and shard.file not in changed and is_older(source, shard.file, manifest_file) else None
        )

    return with_checksums(splits, find_checksum)


def _shard_digests(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [shard.index for shard in split.shards] for name, split in manifest.splits.items()}
