"""Packing of images in folders: one folder per class, or without labels."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.format.manifest import read_manifest
from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.atomic_folder import is_packed
from foveal.data.pack.folder_labels import FOLDER_LABELS, NO_LABELS, check_labels_option, choose_label_source
from foveal.data.pack.folder_listing import FolderListing, ListedFiles, note_numbers
from foveal.data.pack.folder_splits import choose_splits, states_no_splits
from foveal.data.pack.image_sources import ImageSources, find_sources, scan_sources
from foveal.data.pack.image_tree import ImageFolder, PassedOver
from foveal.data.pack.label_images import leave_out_label_images
from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset, PackSample, PackSplit, build_splits, hashed_order, make_webdataset_key
from foveal.data.pack.writer import map_in_order, write_dataset_if_absent
from foveal.errors import DataError

_CHUNK = 256  # files per job that reads file sizes


@dataclass(frozen=True)
class _Request:
    """Images to pack, and the options that say what folders and files mean."""

    sources: ImageSources
    labels: str | None
    splits: str | None
    masks: str | None


def pack_folder(
    images: Path | ImageSources,
    output_folder: Path,
    *,
    labels: str | None = None,
    splits: str | None = None,
    masks: str | None = None,
    **options: Any,
) -> bool:
    """Pack images in folders as shards in hashed order.

    images: a folder, or several paths, globs and lists of files (of ``find_sources``). labels: 'none' packs images at
    any depth without classes, 'folders' takes the sub-folders as classes. Without it, images in one folder have no
    classes, and one level of sub-folders that has all images has the classes. Sub-folders with the usual names of splits
    (train, val, valid, validation, test, ...) are splits; beside splits with classes, one that is neither train nor val
    may have no labels. ``splits`` states the folders, such as 'train=training,val=dev', or that there are none ('none').
    ``masks`` says whether files that are named as masks or other labels of images are left out ('skip') or are images
    too ('pack'). Without a second split, ``val_fraction`` of every class, or of all images, is for validation. Files are
    stored unchanged unless ``options`` (of PackOptions) change them. mean and std are estimated from at most 4,096
    training images. Return whether the shards were written now.
    Raises: DataError if the source is missing or empty, it is open whether folders are splits or classes or whether
    files are masks, a split has classes that train lacks, an image that must be decoded does not decode, or the target
    holds other files or another data set; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    check_labels_option(labels)
    sources = find_sources([images]) if isinstance(images, Path) else images
    source = PackSource("folder", sources.root, {"splits": splits, "masks": masks})

    def load_dataset() -> PackDataset:
        stated = labels or _labels_of_packed(output_folder)
        return _list_dataset(_Request(sources, stated, splits, masks), output_folder, pack_options)

    return write_dataset_if_absent(output_folder, source, load_dataset, pack_options)


def _labels_of_packed(output_folder: Path) -> str | None:
    """Return the option ``labels`` that a packed folder answers; None if nothing is packed there.

    Folders that an earlier version took as classes may be asked about now, which is no question where they are packed.
    """
    if not is_packed(output_folder):
        return None
    return NO_LABELS if read_manifest(output_folder).classes is None else FOLDER_LABELS


def make_file_sample(files: Sequence[Path], labels: np.ndarray, number: int, location: str = "") -> PackSample:
    """Return the sample of a file; its suffix gives the field."""
    file = files[number]
    suffix = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    field = suffix if suffix in IMAGE_EXTENSIONS else None
    return PackSample(
        make_webdataset_key(number, file.stem), field, int(labels[number]), file.read_bytes, location or str(file)
    )


def _list_dataset(request: _Request, output: Path, options: PackOptions) -> PackDataset:
    sources, passed_over = request.sources, PassedOver()
    tree = scan_sources(sources, passed_over, output, options.workers)
    tree = leave_out_label_images(tree, request.masks, passed_over, compare_top=request.splits is None)
    stated_labels = request.labels
    if stated_labels is None and states_no_splits(request.splits) and tree.filled_folders:
        stated_labels = FOLDER_LABELS  # --splits none says that all folders are classes
    splits = choose_splits(
        tree,
        request.splits,
        passed_over,
        with_classes=stated_labels != NO_LABELS,
        are_classes_stated=stated_labels == FOLDER_LABELS,
    )
    label_source = choose_label_source(tree, splits, stated_labels, is_one_folder=sources.is_folder)
    listing = FolderListing(passed_over)
    list_images = listing.list_unlabelled if label_source == NO_LABELS else listing.list_labelled
    images = list_images(tree, splits)
    pack_splits = _build_splits(images, options.val_fraction)
    classes = next(iter(images.values())).classes
    note_numbers(classes, listing.notes)
    _note_shared_files(images.values(), listing.notes)
    digest, num_bytes = _digest_listing(sources.root, images, options.workers, listing.notes)
    return PackDataset(
        sources.root.resolve().name or "images",
        classes or None,
        pack_splits,
        summary=(
            _describe_source(request, images, num_bytes),
            _describe_labels(request, classes, splits),
            _describe_splits(request, splits, pack_splits, options.val_fraction),
            f"passed over: {passed_over.describe() or 'nothing'}",
        ),
        notes=tuple(listing.notes),
        listing=digest,
    )


def _build_splits(images: dict[str, ListedFiles], val_fraction: float) -> dict[str, PackSplit]:
    """Return the splits in hashed order; a single split 'train' is divided."""
    if list(images) == ["train"]:
        listed = images["train"]
        return build_splits(None, listed.labels, val_fraction, partial(make_file_sample, listed.paths, listed.labels))
    return {
        split: PackSplit(
            order := hashed_order(len(listed.files)),
            listed.labels[order],
            partial(make_file_sample, listed.paths, listed.labels),
        )
        for split, listed in images.items()
    }


def _describe_source(request: _Request, images: dict[str, ListedFiles], num_bytes: int) -> str:
    files = [file for listed in images.values() for file in listed.files]
    suffixes = Counter(file.path.suffix.lower() for file in files)
    num_folders = len({file.path.parent for file in files})
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in suffixes.most_common())
    return (
        f"source: {len(files):,} {'images' if files[1:] else 'image'} ({kinds}) in {num_folders:,} "
        f"{'folders' if num_folders > 1 else 'folder'}{request.sources.describe()}, {num_bytes / 1e6:,.1f} MB"
    )


def _describe_labels(request: _Request, classes: Sequence[str], splits: dict[str, ImageFolder]) -> str:
    if not classes:
        reason = f"no {'class folders in the splits' if splits else 'sub-folders'}: images without labels"
        return f"labels: {'none, as stated' if request.labels == NO_LABELS else reason}"
    if len(classes) == 1:
        return f"labels: the folder '{classes[0]}' is the only class; --labels none packs images without labels"
    return f"labels: {len(classes):,} classes, one per folder{', as stated' if request.labels == FOLDER_LABELS else ''}"


def _describe_splits(
    request: _Request, splits: dict[str, ImageFolder], pack_splits: dict[str, PackSplit], val_fraction: float
) -> str:
    tree, num_val = request.sources.root, len(pack_splits["val"].labels) if "val" in pack_splits else 0
    if len(splits) > 1 or "train" not in pack_splits:
        by = "as stated" if request.splits else "by the names of the folders"
        names = {split: folder.path.relative_to(tree).as_posix() for split, folder in splits.items()}
        pairs = (split if split == name else f"{split} is '{name}'" for split, name in names.items())
        return f"splits: {', '.join(pairs)}, {by}"
    if splits:
        return f"splits: '{splits['train'].name}' is the only split: {num_val:,} of its images become 'val'"
    if not num_val:
        return f"splits: all images are 'train'{_explain_no_val(pack_splits, val_fraction)}"
    part = "the images" if (pack_splits["train"].labels < 0).all() else "every class"
    return f"splits: {100 * val_fraction:.3g} % of {part}, drawn at random, become 'val' (--val-fraction)"


def _explain_no_val(pack_splits: dict[str, PackSplit], val_fraction: float) -> str:
    """Return why a fraction of the images is none of them; nothing if no fraction is stated."""
    if not val_fraction:
        return ""
    labels = pack_splits["train"].labels
    part, counts = ("the images", [len(labels)]) if (labels < 0).all() else ("every class", np.bincount(labels))
    remedy = ", and a larger --val-fraction makes a 'val'" if max(counts) > 1 else ""
    return f"; {100 * val_fraction:.3g} % of {part} is less than one image{remedy}"


def _note_shared_files(listed_splits: Iterable[ListedFiles], notes: list[str]) -> None:
    """Note files that links put into several classes or splits."""
    files = [file for listed in listed_splits for file in listed.files]
    if not any(file.linked for file in files):
        return
    num_shared = len(files) - len({file.real_path for file in files})
    if num_shared:
        notes.append(f"{num_shared:,} images are further links to an image of another class or split, and are packed")


def _digest_listing(source: Path, images: dict[str, ListedFiles], workers: int, notes: list[str]) -> tuple[str, int]:
    """Return a digest of the names and sizes of all files, and their bytes; note files with several names."""
    digest = hashlib.sha256()
    files = [(split, file.path) for split, listed in images.items() for file in listed.files]
    chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
    hard_links: Counter[tuple[int, int]] = Counter()
    num_bytes = 0
    for described in map_in_order(partial(_describe_files, source), chunks, workers):
        digest.update(json.dumps([file[:-1] for file in described]).encode())
        num_bytes += sum(size for _, _, size, _ in described)
        hard_links.update(inode for *_, inode in described if inode is not None)
    if repeated := hard_links.total() - len(hard_links):
        notes.append(f"{repeated:,} images are further names (hard links) of another, and are packed")
    return digest.hexdigest(), num_bytes


def _describe_files(
    source: Path, files: Sequence[tuple[str, Path]]
) -> list[tuple[str, str, int, tuple[int, int] | None]]:
    """Return split, name and size of files, and device and inode of those with several names.

    Raises: DataError for a file that is gone.
    """
    prefix = len(str(source / "x")) - 1
    described: list[tuple[str, str, int, tuple[int, int] | None]] = []
    for split, file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): restore or remove it") from None
        inode = (status.st_dev, status.st_ino) if status.st_nlink > 1 and not file.is_symlink() else None
        described.append((split, unicodedata.normalize("NFC", str(file)[prefix:]), status.st_size, inode))
    return described
